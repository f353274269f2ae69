// The data, and small helpers: elements, numbers as text, colours.
const look = JSON.parse(document.getElementById("look").textContent);
const byId = (id) => document.getElementById(id);
const range = (count) => Array.from({ length: count }, (_, i) => i);
const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);
const onSpecial = (shares) => sum(shares.slice(0, look.num_special));
const average = (numbers) => sum(numbers) / numbers.length;

// Text of the user goes through createTextNode or setAttribute only, never through HTML.
function make(namespace, name, attributes, children) {
  const node = namespace ? document.createElementNS(namespace, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value === undefined || value === null || value === false) continue;
    node.setAttribute(key, value === true ? "" : value);
  }
  for (const child of children.flat()) {
    node.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
  return node;
}
const html = (name, attributes, ...children) => make(null, name, attributes, children);
const svg = (name, attributes, ...children) => make("http://www.w3.org/2000/svg", name, attributes, children);

const missing = "–";
const percent = (x, digits = 0) => (x === null ? missing : `${(100 * x).toFixed(digits)} %`);
const fixed = (x, digits = 2) => (x === null ? missing : x.toFixed(digits).replace(/^-(?=[0.]*$)/, "").replace("-", "−"));
const times = (x) => (x === null ? missing : `${x >= 10 ? x.toFixed(0) : x.toFixed(x >= 1 ? 1 : 2)} ×`);
const count = (x) => (Math.abs(x - Math.round(x)) < 1e-6 ? String(Math.round(x)) : x.toFixed(1));
const points = (x) => `${x < 0 ? "−" : "+"}${(100 * Math.abs(x)).toFixed(1)} points`;
const layerName = (l) => `layer ${l + 1}`;
const headName = (h) => `head ${h + 1}`;

// Light or dark: what the system says, until the button was pressed.
const system = matchMedia("(prefers-color-scheme: dark)");
let forced = null;
const isDark = () => (forced === null ? system.matches : forced);
const redraws = [];
// Draws now, and again when the theme changes.
function drawn(draw) {
  redraws.push(draw);
  draw();
}
function retheme() {
  document.documentElement.style.colorScheme = isDark() ? "dark" : "light";
  byId("theme").textContent = isDark() ? "Light" : "Dark";
  byId("theme").setAttribute("aria-label", isDark() ? "Switch to light colours" : "Switch to dark colours");
  byId("theme").setAttribute("aria-pressed", String(isDark()));
  for (const draw of redraws) draw();
}
byId("theme").addEventListener("click", () => { forced = !isDark(); retheme(); });
system.addEventListener("change", retheme);

const RAMPS = {
  amount: {
    light: ["#f6f9fc", "#c9dff0", "#7fb5dc", "#2f7fbf", "#0b3f78"],
    dark: ["#1b212a", "#1f4468", "#2f76b0", "#6fb4e8", "#e2f2ff"],
  },
  change: {
    light: ["#a34100", "#e8955a", "#f6f7f8", "#6fabd9", "#0b4f8f"],
    dark: ["#ffb27a", "#9c5a2c", "#1b212a", "#2f70a5", "#8fcaff"],
  },
};
const channels = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
// A colour for each of 256 steps of a ramp, as [r, g, b].
function palette(name) {
  const stops = RAMPS[name][isDark() ? "dark" : "light"].map(channels);
  return range(256).map((step) => {
    const at = (step / 255) * (stops.length - 1);
    const low = Math.min(Math.floor(at), stops.length - 2);
    return stops[low].map((c, i) => Math.round(c + (at - low) * (stops[low + 1][i] - c)));
  });
}
const step = (t) => Math.max(0, Math.min(255, Math.round(255 * t)));
const css = (rgb) => `rgb(${rgb.join(" ")})`;
// Ink that can be read on this colour.
const inkOn = ([r, g, b]) => (0.299 * r + 0.587 * g + 0.114 * b > 140 ? "#111418" : "#ffffff");

// Scales: from a number to a place on the ramp, 0 to 1, with the numbers that the legend shows.
const SCALES = {
  // small weights stay visible: the root of the share
  attention: { ramp: "amount", place: (x) => Math.sqrt(x), ticks: [0, 0.05, 0.25, 0.5, 1], text: (x) => percent(x) },
  share: { ramp: "amount", place: (x) => x, ticks: [0, 0.25, 0.5, 0.75, 1], text: (x) => percent(x) },
  points: { ramp: "change", place: (x) => 0.5 + 0.5 * Math.sign(x) * Math.sqrt(Math.abs(x)), ticks: [-1, -0.25, 0, 0.25, 1], text: (x) => (x ? points(x).replace(".0 points", "") : "0") },
  cosine: { ramp: "change", place: (x) => (1 + x) / 2, ticks: [-1, -0.5, 0, 0.5, 1], text: (x) => fixed(x, 1) },
};
// From a tenth to the largest in equal factors.
function factorScale(largest) {
  const top = Math.max(1, Math.ceil(Math.log10(Math.max(largest, 1e-9))));
  const place = (x) => (x > 0 ? (Math.log10(x) + 1) / (top + 1) : 0);
  return { ramp: "amount", place, ticks: range(top + 2).map((e) => 10 ** (e - 1)), text: (x) => `${x} ×` };
}
// A strip of the colours with the numbers where they belong.
function legendOf(scale) {
  const width = 240, left = 24, strip = svg("g"), steps = 60;
  const drawing = svg("svg", { viewBox: `0 0 ${width + 2 * left} 30`, class: "strip", "aria-hidden": "true" }, strip);
  const from = scale.place(scale.ticks[0]), to = scale.place(scale.ticks[scale.ticks.length - 1]);
  for (const tick of scale.ticks) {
    const x = left + (width * (scale.place(tick) - from)) / (to - from);
    drawing.append(svg("line", { x1: x, x2: x, y1: 10, y2: 15, class: "axis" }),
      svg("text", { x, y: 26, "text-anchor": "middle" }, scale.text(tick)));
  }
  drawn(() => {
    const colours = palette(scale.ramp);
    strip.replaceChildren(...range(steps).map((i) => svg("rect", {
      x: left + (i * width) / steps, y: 0, width: width / steps + 0.5, height: 10,
      fill: css(colours[step(from + ((i + 0.5) / steps) * (to - from))]),
    })));
  });
  return drawing;
}
