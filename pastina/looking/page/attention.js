// The attention maps: all heads small, one head large, with the adapter and without.
const state = { text: 0, layer: 0, head: 0, row: 0, column: 0 };
const L = look.num_layers, H = look.num_heads;
const layerNumbers = range(L).map((l) => String(l + 1));
const headNumbers = range(H).map((h) => String(h + 1));
const kept = look.texts.map((text) => (text.maps ? { before: unpack(text.maps.before), after: unpack(text.maps.after) } : null));

// Weights are stored as 16-bit whole numbers, low byte first.
function unpack(packed) {
  const bytes = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  return Float32Array.from({ length: bytes.length / 2 }, (_, i) => view.getUint16(2 * i, true) / 65535);
}
const current = () => look.texts[state.text];
const size = () => current().tokens.length;
function weight(side, l, h, i, j) {
  const t = size();
  return kept[state.text][side][((l * H + h) * t + i) * t + j];
}
const isVertical = (side, l, h) => current()[side].vertical_LH[l][h] > 0.5;
const slotColour = (slot) => seriesColour(slot - 1);
const slotInk = (slot) => ((slot - 1) % COLOURS === 1 ? "var(--ink-2)" : "var(--ink-1)");

// Every head of one side, small. Pointing or walking shows the head large.
function mosaic(side, title, onPick) {
  const canvas = html("canvas", { tabindex: "0", role: "application", "aria-roledescription": "overview of heads" });
  const readout = html("p", { class: "readout quiet", role: "status" }, "Rows are layers, columns are heads. A frame marks a vertical head.");
  const figure = html("figure", { class: "mosaic" }, html("figcaption", {}, title),
    html("div", { class: "rowed" }, html("span"), html("div", { class: "heads", "aria-hidden": "true" }, headNumbers.map((n) => html("span", {}, n))),
      html("div", { class: "layers", "aria-hidden": "true" }, layerNumbers.map((n) => html("span", {}, n))), canvas),
    readout);
  let tile = 1;
  function draw() {
    const t = size(), ratio = Math.min(devicePixelRatio || 1, 2);
    const width = Math.max(240, canvas.clientWidth || 480);
    tile = width / H;
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(tile * L * ratio);
    canvas.setAttribute("aria-label", `${title}: ${L} layers, ${H} heads. Arrow keys walk through the heads, Enter shows one large.`);
    const context = canvas.getContext("2d"), colours = palette("amount");
    context.scale(ratio, ratio);
    const small = document.createElement("canvas");
    small.width = small.height = t;
    const pen = small.getContext("2d"), image = pen.createImageData(t, t);
    for (const l of range(L)) for (const h of range(H)) {
      for (let k = 0; k < t * t; k++) {
        const x = kept[state.text][side][(l * H + h) * t * t + k];
        image.data.set([...colours[step(SCALES.attention.place(x))], 255], 4 * k);
      }
      pen.putImageData(image, 0, 0);
      const gap = Math.max(1.5, tile * 0.06), inner = tile - 2 * gap;
      context.imageSmoothingEnabled = t > inner * ratio;
      context.drawImage(small, h * tile + gap, l * tile + gap, inner, inner);
      if (isVertical(side, l, h)) frame(context, h, l, gap, "--mark", 1.5);
      if (l === state.layer && h === state.head) frame(context, h, l, gap / 2, "--focus", 3);
    }
  }
  function frame(context, h, l, gap, colour, width) {
    context.strokeStyle = resolved(colour);
    context.lineWidth = width;
    context.strokeRect(h * tile + gap, l * tile + gap, tile - 2 * gap, tile - 2 * gap);
  }
  const walker = walk(canvas, () => L, () => H, {
    move: (l, h) => {
      const vertical = isVertical(side, l, h) ? "vertical" : "not vertical";
      const special = percent(onSpecial(current()[side].share_LHS[l][h]));
      readout.textContent = `Layer ${l + 1}, head ${h + 1}: ${vertical}, ${special} on special tokens`;
      readout.classList.remove("quiet");
      if (document.activeElement === canvas && canvas.matches(":focus-visible")) onPick(l, h);
    },
    pick: onPick,
    at: (event) => {
      const box = canvas.getBoundingClientRect();
      const h = Math.floor(((event.clientX - box.left) / box.width) * H), l = Math.floor(((event.clientY - box.top) / box.height) * L);
      return l >= 0 && h >= 0 && l < L && h < H ? [l, h] : null;
    },
  });
  return { figure, canvas, draw: () => { walker.set(state.layer, state.head); draw(); } };
}
// What a variable of the style sheet is as a colour that a canvas understands.
function resolved(variable) {
  const probe = html("span", { style: `color:var(${variable})` });
  document.body.append(probe);
  const colour = getComputedStyle(probe).color;
  probe.remove();
  return colour;
}

// One head large. value(i, j): the number of a square; the cursor is shared by the three.
function largeMap(title, scale, value, onMove) {
  const canvas = html("canvas", { tabindex: "0", role: "application", "aria-roledescription": "heat map" });
  const box = html("div", { class: "scroll" }, canvas);
  const figure = html("figure", { class: "map" }, html("figcaption", {}, title), legendOf(scale), box);
  let cell = 1, margin = 1;
  function draw() {
    const text = current(), t = size(), room = Math.max(240, figure.clientWidth || 320);
    const longest = Math.max(...text.tokens.map((token) => Math.min(token.length, 12)));
    margin = Math.min(12 + 7.2 * longest, 96);
    cell = Math.max(t > 90 ? 3.5 : t > 40 ? 5 : 9, Math.min(30, (room - margin - 4) / t));
    const side = margin + t * cell + 2, ratio = Math.min(devicePixelRatio || 1, 2);
    canvas.width = canvas.height = Math.round(side * ratio);
    canvas.style.width = canvas.style.height = `${side}px`;
    canvas.setAttribute("aria-label", `${title}, layer ${state.layer + 1}, head ${state.head + 1}, ${t} by ${t} tokens: rows look at columns. Arrow keys walk through it.`);
    const context = canvas.getContext("2d"), colours = palette(scale.ramp);
    context.scale(ratio, ratio);
    for (const i of range(t)) for (const j of range(t)) {
      context.fillStyle = css(colours[step(scale.place(value(i, j)))]);
      context.fillRect(margin + j * cell, margin + i * cell, cell - (cell > 8 ? 1 : 0), cell - (cell > 8 ? 1 : 0));
    }
    const soft = resolved("--soft"), strong = resolved("--ink");
    const letters = Math.max(9, Math.min(12, cell - 1));
    const family = getComputedStyle(document.body).fontFamily;
    text.tokens.forEach((token, i) => {
      const special = text.slots[i] > 0, chosen = i === state.row;
      if (cell < 8.5 && !special && !chosen && i !== state.column) return;
      const label = token.length > 12 ? `${token.slice(0, 11)}…` : token;
      context.textBaseline = "middle";
      context.textAlign = "right";
      context.fillStyle = special || chosen ? strong : soft;
      context.font = `${special || chosen ? 700 : 400} ${letters}px ${family}`;
      context.fillText(label, margin - 5, margin + (i + 0.5) * cell);
      context.save();
      context.translate(margin + (i + 0.5) * cell, margin - 5);
      context.rotate(-Math.PI / 2);
      context.textAlign = "left";
      context.fillStyle = special || i === state.column ? strong : soft;
      context.font = `${special || i === state.column ? 700 : 400} ${letters}px ${family}`;
      context.fillText(label, 0, 0);
      context.restore();
    });
    context.strokeStyle = resolved("--focus");
    context.lineWidth = 2.5;
    context.strokeRect(margin + state.column * cell, margin + state.row * cell, cell, cell);
  }
  const walker = walk(canvas, size, size, {
    move: onMove,
    at: (event) => {
      const area = canvas.getBoundingClientRect();
      const j = Math.floor((event.clientX - area.left - margin) / cell), i = Math.floor((event.clientY - area.top - margin) / cell);
      return i >= 0 && j >= 0 && i < size() && j < size() ? [i, j] : null;
    },
  });
  return { figure, draw: () => { walker.set(state.row, state.column); draw(); } };
}

function choice(label, names, chosen, onChange, disabled = () => false) {
  const select = html("select", {}, names.map((name, i) => html("option", { value: i, selected: i === chosen, disabled: disabled(i) }, name)));
  select.addEventListener("change", () => onChange(Number(select.value)));
  return { select, label: html("label", {}, label, select) };
}

function drawAttention(section) {
  const first = kept.findIndex((maps) => maps !== null);
  const intro = [html("h2", { id: "attention-title" }, "Attention, head by head")];
  if (first < 0) {
    section.append(...intro, html("p", {}, "The attention maps were left out: they would make this page too large, or were not asked for."));
    return () => {};
  }
  state.text = first;
  [state.layer, state.head] = largest(current().change.first_LH);
  const words = html("p", { class: "words", role: "group", "aria-label": "The text as tokens" });
  const readout = html("p", { class: "readout", role: "status" });
  const left = look.texts.filter((_, i) => kept[i] === null).length;
  const texts = choice("Text", look.texts.map(titleOf), first, (i) => { state.text = i; state.row = state.column = 0; refresh(); }, (i) => kept[i] === null);
  const layers = choice("Layer", layerNumbers, state.layer, (l) => pick(l, state.head));
  const heads = choice("Head", headNumbers, state.head, (h) => pick(state.layer, h));
  const overviews = [mosaic("before", "Without the adapter", pick), mosaic("after", "With the adapter", pick)];
  const at = (side) => (i, j) => weight(side, state.layer, state.head, i, j);
  const maps = [
    largeMap("Without the adapter", SCALES.attention, at("before"), move),
    largeMap("With the adapter", SCALES.attention, at("after"), move),
    largeMap("Change", SCALES.points, (i, j) => at("after")(i, j) - at("before")(i, j), move),
  ];
  const title = html("h3", { id: "head-title" });
  const facts = html("p", { class: "note" });
  const big = html("div", { class: "figures" }, maps.map((map) => map.figure));
  const inNumbers = numbers(() => ["from, to", ...current().tokens], () => current().tokens.map((token, i) => [token, ...current().tokens.map((_, j) => `${percent(at("before")(i, j))} → ${percent(at("after")(i, j))}`)]), "Numbers of this head, without → with");

  section.append(...intro,
    html("p", {}, "Each small square is the attention map of one head: a row for each token that looks, a column for each token that is looked at. A vertical stripe is a column that all tokens look at. Choose a head to see it large."),
    html("div", { class: "controls" }, texts.label), words,
    left ? html("p", { class: "note" }, `The maps of ${left} more ${left === 1 ? "text were" : "texts were"} left out, as this page would become too large.`) : "",
    html("div", { class: "figures", style: "--least:21rem" }, overviews.map((one) => one.figure)),
    title, facts, html("div", { class: "controls" }, layers.label, heads.label), big, readout, inNumbers);

  function move(i, j) {
    [state.row, state.column] = [i, j];
    const from = current().tokens[i], to = current().tokens[j], was = at("before")(i, j), is = at("after")(i, j);
    readout.textContent = `“${from}” looks at “${to}”: ${percent(was, 1)} without, ${percent(is, 1)} with the adapter, ${points(is - was)}`;
    for (const map of maps) map.draw();
  }
  function pick(l, h) {
    [state.layer, state.head] = [l, h];
    layers.select.value = l;
    heads.select.value = h;
    for (const one of overviews) one.draw();
    const { before, after, change } = current();
    const kind = (side) => (side.vertical_LH[l][h] ? "vertical" : side.vertical_all_LH[l][h] ? "vertical over all special tokens" : "not vertical");
    title.textContent = `Layer ${l + 1}, head ${h + 1}`;
    facts.textContent = `Without the adapter ${kind(before)}, ${percent(onSpecial(before.share_LHS[l][h]))} on special tokens; with it ${kind(after)}, ${percent(onSpecial(after.share_LHS[l][h]))}. ` +
      `Its output moves by ${times(change.first_LH[l][h])} its length at the first special token, ${times(change.mean_LH[l][h])} on average.`;
    inNumbers.open = false;
    move(state.row, state.column);
  }
  function refresh() {
    const text = current();
    words.replaceChildren(...text.tokens.flatMap((token, i) => {
      const slot = text.slots[i];
      return [html("span", slot ? { class: "special", style: `background:${slotColour(slot)};color:${slotInk(slot)}` } : {}, token), " "];
    }), text.truncated ? " (the rest was cut off, as for a prediction)" : "");
    big.style.setProperty("--least", `${Math.max(17, Math.min(31, 6 + 0.62 * text.tokens.length))}rem`);
    words.toggleAttribute("tabindex", words.scrollHeight > words.clientHeight);
    if (words.hasAttribute("tabindex")) words.tabIndex = 0; // a long text scrolls, by keys too
    pick(state.layer, state.head);
  }
  refresh();
  const redraw = () => { for (const one of [...overviews, ...maps]) one.draw(); };
  redraws.push(redraw);
  let width = 0;
  new ResizeObserver(([entry]) => {
    if (Math.abs(entry.contentRect.width - width) > 2) { width = entry.contentRect.width; redraw(); }
  }).observe(section);
  return (l, h) => { pick(l, h); title.scrollIntoView({ block: "center" }); };
}
// The number of a text and how it begins; which window it is, where a tagger reads several.
function titleOf(text, i) {
  const whole = text.text_pair === null ? text.text : `${text.text} / ${text.text_pair}`;
  const window = /, window \d+$/.exec(text.name);
  return `${i + 1}: ${whole.length > 80 ? `${whole.slice(0, 79)}…` : whole}${window ? window[0] : ""}`;
}
function largest(grid) {
  let best = [0, 0];
  grid.forEach((row, r) => row.forEach((x, c) => { if (x > grid[best[0]][best[1]]) best = [r, c]; }));
  return best;
}
