"""The ways of tuning. Importing this registers ours with PEFT."""

from pastina.methods.attaching import attach as attach
from pastina.methods.attaching import load as load
from pastina.methods.bitfit import BitFitConfig as BitFitConfig
from pastina.methods.bottleneck import BottleneckConfig as BottleneckConfig
from pastina.methods.catalog import METHODS as METHODS
from pastina.methods.catalog import Method as Method
from pastina.methods.configs import num_prompts as num_prompts
from pastina.methods.full import FullConfig as FullConfig
from pastina.methods.linear import LinearConfig as LinearConfig
from pastina.methods.modes import train_mode as train_mode
from pastina.methods.pasta import PastaConfig as PastaConfig
