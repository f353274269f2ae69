// Drawings that a keyboard can walk through; each has its numbers in a table as well.

// Arrow keys, Home and End move a cursor over rows x columns; Enter picks; pointing does both.
function walk(node, rows, columns, { move, pick, at }) {
  let row = 0, column = 0;
  const go = (r, c) => {
    row = Math.max(0, Math.min(rows() - 1, r));
    column = Math.max(0, Math.min(columns() - 1, c));
    move(row, column);
  };
  node.addEventListener("keydown", (event) => {
    const steps = {
      ArrowUp: [row - 1, column], ArrowDown: [row + 1, column], ArrowLeft: [row, column - 1],
      ArrowRight: [row, column + 1], Home: [row, 0], End: [row, columns() - 1],
    };
    if (event.key in steps) go(...steps[event.key]);
    else if ((event.key === "Enter" || event.key === " ") && pick) pick(row, column);
    else return;
    event.preventDefault();
  });
  node.addEventListener("focus", () => { if (node.matches(":focus-visible")) go(row, column); });
  const point = (event) => { const found = at(event); if (found) go(...found); return found; };
  node.addEventListener("pointermove", point);
  node.addEventListener("click", (event) => { if (point(event) && pick) pick(row, column); });
  return { set: (r, c) => { row = r; column = c; } };
}

function table(head, rows) {
  return html("div", { class: "table", tabindex: "0", role: "region", "aria-label": "Numbers" },
    html("table", {},
      html("thead", {}, html("tr", {}, head.map((name) => html("th", { scope: "col" }, name)))),
      html("tbody", {}, rows().map(([name, ...cells]) =>
        html("tr", {}, html("th", { scope: "row" }, name), cells.map((cell) => html("td", {}, cell)))))));
}
// The table is built when somebody opens it.
function numbers(head, rows, title = "Numbers") {
  const box = html("details", {}, html("summary", {}, title));
  box.addEventListener("toggle", () => {
    while (box.childNodes.length > 1) box.lastChild.remove();
    if (box.open) box.append(table(typeof head === "function" ? head() : head, rows));
  });
  return box;
}

// Squares of rows x columns. options: title, rows and columns (names), rowTitle and columnTitle,
// value(r, c), text(x) of a value, say(r, c) for the readout, scale, cells ("24": their size), write
// (numbers stand in the squares), mark(r, c), pick(r, c).
function squares(options) {
  const { title, rows, columns, value, text, say, scale, mark, pick } = options;
  const size = options.cells || 26, left = options.left || 22, top = 20;
  const width = left + columns.length * size + 2, height = top + rows.length * size + 2;
  const cells = svg("g"), marks = svg("g"), cursor = svg("rect", { width: size, height: size, fill: "none", stroke: "var(--focus)", "stroke-width": 3, visibility: "hidden" });
  const drawing = svg("svg", {
    viewBox: `0 0 ${width} ${height}`, tabindex: "0", role: "application", "aria-roledescription": "heat map",
    "aria-label": `${title}. ${rows.length} rows, ${columns.length} columns. Arrow keys walk through it${pick ? ", Enter shows the head" : ""}.`,
    style: `max-width:${Math.round(width * (options.zoom || 1.35))}px`,
  }, cells, marks, cursor);
  rows.forEach((name, r) => drawing.append(svg("text", { x: left - 5, y: top + (r + 0.5) * size + 4, "text-anchor": "end" }, name)));
  columns.forEach((name, c) => drawing.append(svg("text", { x: left + (c + 0.5) * size, y: top - 6, "text-anchor": "middle" }, name)));
  const readout = html("p", { class: "readout quiet", role: "status" }, options.hint || "Rows are layers, columns are heads.");
  const draw = () => {
    const colours = palette(scale().ramp);
    cells.replaceChildren();
    marks.replaceChildren();
    rows.forEach((_, r) => columns.forEach((_, c) => {
      const x = left + c * size, y = top + r * size, number = value(r, c);
      const colour = number === null ? null : colours[step(scale().place(number))];
      cells.append(svg("rect", { x: x + 0.5, y: y + 0.5, width: size - 1, height: size - 1, rx: 3, fill: colour ? css(colour) : "none", stroke: colour ? "none" : "var(--line)" }));
      if (options.write) cells.append(svg("text", { x: x + size / 2, y: y + size / 2 + 3.5, "text-anchor": "middle", style: `font-size:${options.letters || 9}px;fill:${colour ? inkOn(colour) : "var(--soft)"}` }, options.write(number)));
      if (mark && mark(r, c)) marks.append(svg("rect", { x: x + 2, y: y + 2, width: size - 4, height: size - 4, rx: 2, fill: "none", stroke: "var(--mark)", "stroke-width": 1.6 }));
    }));
  };
  walk(drawing, () => rows.length, () => columns.length, {
    move: (r, c) => {
      cursor.setAttribute("x", left + c * size);
      cursor.setAttribute("y", top + r * size);
      cursor.setAttribute("visibility", "visible");
      readout.textContent = say(r, c);
      readout.classList.remove("quiet");
    },
    pick,
    at: (event) => {
      const box = drawing.getBoundingClientRect(), zoom = width / box.width;
      const c = Math.floor(((event.clientX - box.left) * zoom - left) / size);
      const r = Math.floor(((event.clientY - box.top) * zoom - top) / size);
      return r >= 0 && c >= 0 && r < rows.length && c < columns.length ? [r, c] : null;
    },
  });
  drawing.addEventListener("blur", () => cursor.setAttribute("visibility", "hidden"));
  drawing.addEventListener("pointerleave", () => { if (document.activeElement !== drawing) cursor.setAttribute("visibility", "hidden"); });
  drawn(draw);
  const caption = html("figcaption", {}, title);
  const figure = html("figure", {}, caption, drawing, readout,
    numbers([`${options.corner || "layer"}`, ...columns], () => rows.map((name, r) => [name, ...columns.map((_, c) => text(value(r, c)))])));
  return { figure, draw, caption, readout };
}

const MARKERS = [
  (x, y) => svg("circle", { cx: x, cy: y, r: 4 }),
  (x, y) => svg("rect", { x: x - 3.7, y: y - 3.7, width: 7.4, height: 7.4 }),
  (x, y) => svg("path", { d: `M${x} ${y - 5}l4.6 8h-9.2z` }),
  (x, y) => svg("path", { d: `M${x} ${y - 5.2}l5 5.2-5 5.2-5-5.2z` }),
];
const COLOURS = 8;
const seriesColour = (i) => `var(--slot-${(i % COLOURS) + 1})`;
// Where the colours begin again, the markers are other ones.
const markerOf = (one, i) => MARKERS[(one.marker ?? i + Math.floor(i / COLOURS)) % MARKERS.length];
// Lines over layers. series: [{name, values, colour, dashed}]; low, high: ends of the scale, 0 is in it.
function lines({ title, names, series, text, low, high, corner = "layer" }) {
  const width = 390, height = 220, left = 46, right = 14, top = 12, bottom = 34;
  const known = series.flatMap((one) => one.values).filter((x) => x !== null);
  const least = low ?? Math.min(0, ...known), most = high ?? niceTop(Math.max(...known, 1e-9));
  const x = (i) => left + (names.length === 1 ? 0.5 : i / (names.length - 1)) * (width - left - right);
  const y = (v) => top + (1 - (v - least) / (most - least)) * (height - top - bottom);
  const described = series.map((one) => `${one.name}: ${one.values.map(text).join(", ")}`).join(". ");
  const drawing = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${title}, by ${corner}. ${described}`, style: `max-width:${width * 1.3}px` });
  for (const tick of range(5).map((i) => least + (i / 4) * (most - least))) {
    drawing.append(svg("line", { x1: left, x2: width - right, y1: y(tick), y2: y(tick), class: "axis", "stroke-width": Math.abs(tick) < 1e-9 ? 2 : 1 }));
    drawing.append(svg("text", { x: left - 7, y: y(tick) + 4, "text-anchor": "end" }, text(tick)));
  }
  const every = Math.ceil(names.length / 14);
  names.forEach((name, i) => { if (i % every === 0) drawing.append(svg("text", { x: x(i), y: height - bottom + 17, "text-anchor": "middle" }, name)); });
  drawing.append(svg("text", { x: (left + width - right) / 2, y: height - 2, "text-anchor": "middle" }, corner));
  series.forEach((one, s) => {
    const colour = one.colour || seriesColour(s);
    let path = "", pen = "M";
    one.values.forEach((v, i) => {
      if (v === null) { pen = "M"; return; }
      path += `${pen}${x(i)} ${y(v)}`;
      pen = "L";
    });
    drawing.append(svg("path", { d: path, fill: "none", stroke: colour, "stroke-width": 2.2, "stroke-dasharray": one.dashed ? "5 4" : null, "stroke-linejoin": "round" }));
    one.values.forEach((v, i) => {
      if (v === null) return;
      const marker = markerOf(one, s)(x(i), y(v));
      marker.setAttribute("fill", one.dashed ? "var(--card)" : colour);
      marker.setAttribute("stroke", colour);
      marker.setAttribute("stroke-width", one.dashed ? 2 : 1);
      marker.append(svg("title", {}, `${one.name}, ${corner} ${names[i]}: ${text(v)}`));
      drawing.append(marker);
    });
  });
  return html("figure", {}, html("figcaption", {}, title), drawing, series.length > 1 ? keyOf(series) : "",
    numbers([corner, ...series.map((one) => one.name)], () => names.map((name, i) => [name, ...series.map((one) => text(one.values[i]))])));
}
function keyOf(series) {
  return html("div", { class: "legend" }, series.map((one, s) => {
    const marker = markerOf(one, s)(8, 8), colour = one.colour || seriesColour(s);
    marker.setAttribute("fill", one.dashed ? "var(--card)" : colour);
    marker.setAttribute("stroke", colour);
    marker.setAttribute("stroke-width", one.dashed ? 2 : 1);
    return html("span", {}, svg("svg", { viewBox: "0 0 16 16", style: "width:1rem;display:inline-block;vertical-align:-.2em;margin-right:.3rem", "aria-hidden": "true" }, marker), one.name);
  }));
}
function niceTop(x) {
  const base = 10 ** Math.floor(Math.log10(x));
  return [1, 1.2, 1.6, 2, 2.4, 3.2, 4, 6, 8, 10].map((f) => f * base).find((f) => f >= x * 0.999);
}

// For each name two bars, before and after, of shares that make one. parts: [{name, colour, ink}].
function shares({ title, names, parts, before, after, corner = "layer" }) {
  const bar = 17, gap = 15, height = names.length * (2 * bar + gap);
  const drawing = svg("svg", { role: "img", "aria-label": `${title}. The numbers are in the table below.`, height });
  const draw = () => {
    const width = Math.min(860, Math.max(250, drawing.parentNode ? drawing.parentNode.clientWidth : 860));
    const isNarrow = width < 480, left = isNarrow ? 26 : 66, full = width - left - 2;
    drawing.setAttribute("viewBox", `0 0 ${width} ${height}`);
    drawing.setAttribute("style", `width:${width}px`);
    drawing.replaceChildren();
    names.forEach((name, r) => {
      drawing.append(svg("text", { x: 0, y: r * (2 * bar + gap) + bar + 4 }, isNarrow ? name : `${corner} ${name}`));
      [[before, "without", "var(--before)"], [after, "with", "var(--after)"]].forEach(([side, word, colour], b) => {
        const y = r * (2 * bar + gap) + b * (bar + 1);
        let x = left;
        drawing.append(svg("rect", { x: left - 7, y, width: 4, height: bar, fill: colour }));
        parts.forEach((part, p) => {
          const share = side[r][p], long = share * full;
          const box = svg("rect", { x, y, width: Math.max(0, long - 1), height: bar, fill: part.colour });
          box.append(svg("title", {}, `${corner} ${name}, ${word}: ${part.name} ${percent(share, 1)}`));
          drawing.append(box);
          if (long > 34) drawing.append(svg("text", { x: x + 5, y: y + bar - 5, style: `fill:${part.ink}` }, percent(share)));
          x += long;
        });
      });
    });
  };
  const key = html("div", { class: "legend" },
    html("span", {}, html("i", { style: "background:var(--before)" }), "without the adapter (upper bar)"),
    html("span", {}, html("i", { style: "background:var(--after)" }), "with it (lower bar)"),
    parts.map((part) => html("span", {}, html("i", { style: `background:${part.colour}` }), part.name)));
  const figure = html("figure", {}, html("figcaption", {}, title), key, drawing,
    numbers([corner, ...parts.flatMap((part) => [`${part.name}, without`, `${part.name}, with`])],
      () => names.map((name, r) => [name, ...parts.flatMap((_, p) => [percent(before[r][p], 1), percent(after[r][p], 1)])])));
  new ResizeObserver(draw).observe(figure);
  return figure;
}
