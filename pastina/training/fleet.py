"""Many adapters trained together: one pass over the frozen backbone for the batches of many.

Each member is a run of its own (recipe, folder, optimiser, random numbers, early stopping, resume), and
ends as if it had been trained alone. Only the passes through the backbone are shared. On a CPU with
several cores a fleet has parts, each with passes of its own; see `crew`.
"""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from pastina.engine import make_encoder
from pastina.engine.addition import Addition
from pastina.engine.encoder import Encoder
from pastina.engine.packed import Joint, PackedEngine
from pastina.errors import PastinaError, RecipeError
from pastina.recipe import Recipe
from pastina.training.accelerated import accelerated
from pastina.training.crew import Crew
from pastina.training.events import Event, Note, OfMember, OnEvent, ignore
from pastina.training.fit import (
    Run,
    alone_in,
    begin,
    check_folder,
    finish,
    read_run,
    stop_on_signal,
)
from pastina.training.loop import Loop, Stopped
from pastina.training.prepare import Source, prepare

logger = logging.getLogger("pastina")

MAX_TOKENS = 8192
_LEAST = 2  # members of a part of a fleet
_MOST = 4  # parts
_SWEEP = 16  # members after which what the accelerator keeps of them is let go


def train_fleet(
    recipes: Sequence[Recipe],
    outs: Sequence[str | Path],
    *,
    resume: bool = False,
    on_event: OnEvent = ignore,
    max_tokens: int = MAX_TOKENS,
) -> list[Run | PastinaError]:
    """Train one adapter per recipe, together; outs: one folder each, laid out as by `train`.

    A member that fails is dropped and told of (a Note); its place in the result holds the error. A
    member's `seconds` are about its share of the steps that it took part in.
    Members with the same backbone and precision share its passes; the linear probe and backbones that
    the packed engine does not know take their own steps in turn.

    Args:
        resume: go on with the members that were begun, begin the others, skip those that are done.
        on_event: hears of everything as OfMember, one thing at a time, in any thread.
        max_tokens: tokens in the shared passes, about; members beyond wait for others to end.

    Raises:
        RecipeError: not one folder each; full fine-tuning, a method that only PEFT knows, or trackers
            in a fleet; several processes.
        Stopped: Ctrl-C; every member is saved.
    """
    folders = [Path(out) for out in outs]
    if len(folders) != len(recipes):
        raise RecipeError(f"{len(recipes)} recipes need as many folders, not {len(folders)}.")
    twice = [str(f) for f, count in Counter(f.resolve() for f in folders).items() if count > 1]
    if twice:
        raise RecipeError(
            f"Two runs of the fleet have the same folder, {twice[0]}. Give the recipes different names."
        )
    for recipe in recipes:
        _check_member(recipe)
    return _Fleet(recipes, folders, resume, on_event, max_tokens).go()


def _check_member(recipe: Recipe) -> None:
    name = recipe.name or recipe.method.name
    if recipe.method.name == "full":
        raise RecipeError(
            f"{name}: full fine-tuning changes the backbone that a fleet shares. Train it alone."
        )
    if recipe.method.name == "peft":
        raise RecipeError(
            f"{name}: a method that only PEFT knows may change the backbone that a fleet shares. Train "
            "it alone."
        )
    if recipe.fit.report_to:
        raise RecipeError(
            f"{name}: a fleet has no trackers. Remove fit.report_to, or train it alone."
        )


class _Member:
    """One run in a fleet, with random numbers of its own."""

    def __init__(self, loop: Loop, stack: ExitStack, crew: Crew) -> None:
        self.loop, self.stack, self.crew = loop, stack, crew
        self._random = _random_state(loop)
        loop.away, loop.share = self._away, lambda: 1 / crew.num_busy

    @property
    def joins(self) -> PackedEngine | None:
        """The engine by which it takes part in shared passes; None: it steps by itself."""
        engine = self.loop.engine
        return engine if isinstance(engine, PackedEngine) else None

    @property
    def tokens(self) -> float:
        """Of a step, on average."""
        lengths = self.loop.lengths
        rows = min(self.loop.fit.batch, len(lengths)) * self.loop.objective.copies
        return sum(lengths) / max(len(lengths), 1) * rows

    @property
    def group(self) -> tuple[int, Any] | None:
        """Of the members with the same one, what is learned together does not differ from alone: whoever
        moves biases needs the layers step by step, and others would go that way with it."""
        if self.joins is None:
            return None
        method = self.loop.run.recipe.method
        return id(self.joins.encoder), getattr(method, "bias_layers", None)

    @contextmanager
    def random(self) -> Iterator[None]:
        """Draws inside are this member's, as if it were alone."""
        outer = _random_state(self.loop)
        _set_random_state(self._random)
        try:
            yield
        finally:
            self._random = _random_state(self.loop)
            _set_random_state(outer)

    @contextmanager
    def _away(self) -> Iterator[None]:
        """Within `random`: meanwhile others may draw; this one does not."""
        own = _random_state(self.loop)
        try:
            with self.crew.away():
                yield
        finally:
            _set_random_state(own)


class _Fleet:
    """The members that run, those that wait, and what came of the others."""

    def __init__(
        self,
        recipes: Sequence[Recipe],
        folders: Sequence[Path],
        resume: bool,
        on_event: OnEvent,
        max_tokens: int,
    ) -> None:
        self.recipes = [recipe.resolved() for recipe in recipes]
        self.folders, self.resume = folders, resume
        self.on_event, self.max_tokens = on_event, max_tokens
        self.found: dict[int, Run | PastinaError] = {}
        self.waiting = deque(range(len(recipes)))
        self.parts: list[_Part] = []
        self.source = Source(is_shared=True)
        self.encoders: dict[tuple[str, str], Encoder | None] = {}

    def go(self) -> list[Run | PastinaError]:
        """Until nobody runs or waits."""
        with ExitStack() as stack:
            accelerator = stack.enter_context(accelerated(self.recipes[0], self.folders[0]))
            if accelerator.num_processes > 1:
                raise RecipeError("A fleet trains in one process. Start it without torchrun.")
            is_asked_to_stop = stack.enter_context(stop_on_signal())
            crew = Crew(_crew_size(accelerator, len(self.recipes)))
            self.parts = [
                _Part(self, crew, accelerator, is_asked_to_stop) for _ in range(crew.size)
            ]
            crew.go([part.go for part in self.parts])
            if self.num_left():
                raise self._stopped()
        return [self.found[i] for i in range(len(self.recipes))]

    def num_left(self) -> int:
        """Members that run or wait."""
        return len(self.waiting) + self.num_running()

    def num_running(self) -> int:
        """Of all parts."""
        return sum(len(part.running) for part in self.parts)

    def has_room(self) -> bool:
        """Whether the budget lasts for one more member."""
        return sum(part.tokens for part in self.parts) < self.max_tokens

    def encoder(self, model: Any, recipe: Recipe) -> Encoder | None:
        """The shared encoder of this recipe's backbone, where the packed engine can run it."""
        key = (repr(recipe.backbone), recipe.fit.precision)
        if self.encoders.get(key) is None:  # a member before may have had a method without one
            self.encoders[key] = make_encoder(model, recipe.fit.precision)
        return self.encoders[key]

    def teller(self, index: int) -> Callable[[Event], None]:
        """Tells of this member's events."""
        name = str(self.folders[index])

        def tell(event: Event) -> None:
            assert not isinstance(event, OfMember)
            self.on_event(OfMember(name, event))

        return tell

    def _stopped(self) -> Stopped:
        failed = sum(isinstance(run, PastinaError) for run in self.found.values())
        counts = [f"{len(self.found) - failed} of {len(self.recipes)} members are done"]
        counts += [f"{failed} failed"] if failed else []
        counts += [f"{self.num_running()} are saved where they stand"]
        return Stopped(f"Stopped: {', '.join(counts)}. Go on by the same command with --resume.")


class _Part:
    """The members of a fleet that take their steps together, in a thread of the crew."""

    def __init__(
        self, fleet: _Fleet, crew: Crew, accelerator: Any, is_asked_to_stop: Callable[[], bool]
    ) -> None:
        self.fleet, self.crew, self.accelerator = fleet, crew, accelerator
        self.is_asked_to_stop = is_asked_to_stop
        self.running: dict[int, _Member] = {}

    @property
    def tokens(self) -> float:
        """Of a step of its members, on average."""
        return sum(member.tokens for member in self.running.values())

    def go(self) -> None:
        """Until none of its members runs and nobody waits that others have not the room for, or somebody
        asked to stop."""
        try:
            while not self._must_end():
                self._admit()
                if not self.running:
                    return
                self._step()
            if self.is_asked_to_stop():
                for member in self.running.values():
                    with member.random():
                        member.loop.save()
        finally:
            for member in self.running.values():
                member.stack.close()

    def _must_end(self) -> bool:
        return self.crew.is_over or self.is_asked_to_stop()

    def _admit(self) -> None:
        """Begin members while the budget lasts, no more than other parts; one in any case."""
        fleet = self.fleet
        while fleet.waiting and not self._must_end():
            share = self.crew.num_busy
            is_full = self.tokens >= fleet.max_tokens / share
            is_enough = is_full or len(self.running) * share >= fleet.num_left()
            if (self.running and is_enough) or (fleet.num_running() and not fleet.has_room()):
                return
            index = fleet.waiting.popleft()
            with self._survives(index):
                self._begin(index)

    def _begin(self, index: int) -> None:
        fleet, accelerator = self.fleet, self.accelerator
        recipe, folder = fleet.recipes[index], fleet.folders[index]
        resume = fleet.resume and (folder / "recipe.toml").is_file()
        check_folder(folder, recipe, resume)
        if resume and (run := read_run(folder)) is not None:
            fleet.found[index] = run
            return
        tell = fleet.teller(index)
        with ExitStack() as stack:
            stack.enter_context(alone_in(folder, accelerator))
            prepared = prepare(recipe, tell, fleet.source)
            encoder = fleet.encoder(prepared.model, recipe)
            loop = begin(
                prepared,
                folder,
                tell,
                accelerator,
                resume=resume,
                encoder=encoder,
                source=fleet.source,
            )
            self.running[index] = _Member(loop, stack.pop_all(), self.crew)
        if index % _SWEEP == 0:
            accelerator.free_memory()  # it would keep the models of all members that were there

    @contextmanager
    def _survives(self, index: int) -> Iterator[None]:
        """An error of this member ends this member alone."""
        try:
            yield
        except Stopped:
            raise
        except (PastinaError, OSError) as error:
            self._drop(
                index, error if isinstance(error, PastinaError) else PastinaError(str(error))
            )
        except Exception as error:  # nobody foresaw it, and the others have no part in it
            logger.debug("A member of the fleet failed.", exc_info=True)
            self._drop(index, PastinaError(f"{type(error).__name__}: {error}"))

    def _drop(self, index: int, error: PastinaError) -> None:
        fleet = self.fleet
        fleet.found[index] = error
        fleet.teller(index)(Note(f"{fleet.folders[index]} is dropped: {error}"))
        if (member := self.running.pop(index, None)) is not None:
            member.stack.close()

    def _step(self) -> None:
        """One step of every member that runs; ends the epochs that are over."""
        together: dict[tuple[int, Any], dict[int, list[int]]] = {}
        for index, member in list(self.running.items()):
            with self._survives(index), member.random():
                indices = member.loop.next_indices()
                if indices is None:
                    self._end_epoch(index, member)
                elif (group := member.group) is None:
                    member.loop.step(indices)
                else:
                    together.setdefault(group, {})[index] = indices
        for chosen in together.values():
            self._step_together(chosen)
        for index, member in list(self.running.items()):
            with self._survives(index), member.random():
                if member.loop.is_due():
                    member.loop.save()

    def _end_epoch(self, index: int, member: _Member) -> None:
        loop = member.loop
        loop.end_epoch()
        if loop.progress.is_done:
            self.fleet.found[index] = finish(loop)
            del self.running[index]
            member.stack.close()

    def _step_together(self, chosen: dict[int, list[int]]) -> None:
        started, num_busy = time.perf_counter(), self.crew.num_busy
        members = {index: self.running[index] for index in chosen}
        batches = {i: member.loop.batch(chosen[i]) for i, member in members.items()}
        engines = {i: engine for i, m in members.items() if (engine := m.joins) is not None}
        joint = Joint(next(iter(engines.values())).encoder, list(batches.values()))
        additions: list[dict[int, Addition]] = []
        seeds: list[int | None] = []
        for (index, member), place_BT in zip(members.items(), joint.places, strict=True):
            additions.append({})
            seeds.append(None)
            with self._survives(index), member.random():
                additions[-1] = engines[index].additions(batches[index], place_BT)
                seeds[-1] = engines[index].rounding_seed()
        poolings = [engine.task_model.pooling for engine in engines.values()]
        losses: dict[int, torch.Tensor] = {}
        values: dict[int, float] = {}
        with self.crew.away():
            states = joint.states(additions, poolings, None, seeds)
        for (index, member), states_NH in zip(members.items(), states, strict=True):
            loop = member.loop
            if index not in self.running:
                continue
            with self._survives(index), member.random():
                logits_NC = engines[index].task_model.head(states_NH)
                loss = loop.loss(logits_NC, batches[index], chosen[index])
                values[index] = loop.checked(loss)
                losses[index] = loss
        if not losses:
            return
        with self.crew.away():
            torch.stack(list(losses.values())).sum().backward()
        for index in losses:
            with self._survives(index):
                members[index].loop.learn()
        # of the time of all, in which others computed as well
        share = (time.perf_counter() - started) / len(losses) / num_busy
        for index, value in values.items():
            if index not in self.running:
                continue
            with self._survives(index):
                members[index].loop.count_step(chosen[index], value, share)


def _crew_size(accelerator: Any, num_members: int) -> int:
    """How many parts a fleet has: on a CPU one core does what lies between the products of one part,
    while others multiply for the others."""
    if accelerator.device.type != "cpu":
        return 1
    return max(1, min(torch.get_num_threads(), num_members // _LEAST, _MOST))


def _random_state(loop: Loop) -> dict[str, Any]:
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if loop.accelerator.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
