// The sections of the page.
const mean2 = (grid) => average(grid.map(average));
const special = (side) => side.share_LHS.map((row) => row.map(onSpecial));
const hasOrdinary = look.slots.length > look.num_special;
const total = (grid) => sum(grid.map(sum));
const many = look.num_texts > 1;
const where = many ? `Means over ${look.num_texts} texts.` : "";

function heading(section, id, title, ...text) {
  section.append(html("h2", { id }, title), ...text.map((one) => html("p", {}, one)));
}
function tile(name, was, is, note) {
  return html("div", {}, html("dt", {}, name), html("dd", {},
    html("span", { class: "big" }, was === null ? "" : html("span", { class: "was" }, was), was === null ? "" : " → ", html("span", { class: "is" }, is)),
    html("br"), html("span", { class: "small" }, note)));
}

// What both sides read beside the text.
function appended() {
  const extra = look.extra_tokens;
  if (!extra) return "";
  const tokens = extra > 1 ? `${extra} special tokens, +1 to +${extra},` : "one special token, +1,";
  return `The adapter learned with ${tokens} behind each text, so both sides read ${extra > 1 ? "them" : "it"}.`;
}

function drawHeader() {
  const model = look.backbone.split("/").pop();
  byId("kicker").textContent = `pastina look · ${look.kind} · ${look.method} · ${model}`;
  byId("title").textContent = `What “${look.name}” changes inside the backbone`;
  byId("lead").textContent = `${many ? `${look.num_texts} texts` : "One text"} through the frozen backbone without the adapter, and with it: ` +
    `${L} layers of ${H} heads. ${many ? "Counts and shares are means over these texts." : ""} ${appended()}`;
  const heads = `of ${L * H} heads${many ? ", mean over texts" : ""}`;
  const tiles = [
    tile("Vertical heads, as published", count(total(look.before.vertical_LH)), count(total(look.after.vertical_LH)), heads),
    tile("Vertical heads, all special tokens", count(total(look.before.vertical_all_LH)), count(total(look.after.vertical_all_LH)), heads),
    tile("Attention on special tokens", percent(mean2(special(look.before))), percent(mean2(special(look.after))), "mean over all heads"),
  ];
  const [l, h] = largest(look.change.first_LH);
  tiles.push(tile("Output that moves furthest", null, times(look.change.first_LH[l][h]), `its own length, layer ${l + 1}, head ${h + 1}, first token`));
  byId("tiles").append(...tiles);
  byId("foot").textContent = `Made by pastina look from the adapter ${look.digest.slice(0, 12)} on ${look.backbone}. This page is one file and loads nothing.`;
}

function drawShare(section, open) {
  heading(section, "share-title", "Where the attention goes",
    `The share of a head's attention that goes to each special token${hasOrdinary ? ", and to each ordinary token that has a vector in its place" : ""}, averaged over the tokens that look. ${where}`);
  const names = ["all special tokens", ...look.slots];
  let slot = 0;
  const share = (side) => (l, h) => (slot ? look[side].share_LHS[l][h][slot - 1] : onSpecial(look[side].share_LHS[l][h]));
  const change = (l, h) => share("after")(l, h) - share("before")(l, h);
  const grid = (title, value, scale, text) => squares({
    title, rows: layerNumbers, columns: headNumbers, value, text, scale: () => scale, pick: open,
    say: (l, h) => `Layer ${l + 1}, head ${h + 1}: ${names[slot]} ${percent(share("before")(l, h), 1)} → ${percent(share("after")(l, h), 1)}`,
  });
  const grids = [grid("Without the adapter", share("before"), SCALES.share, (x) => percent(x, 1)),
    grid("With the adapter", share("after"), SCALES.share, (x) => percent(x, 1)), grid("Change", change, SCALES.points, points)];
  const chooser = choice("Attention to", names, 0, (i) => { slot = i; for (const one of grids) one.draw(); });
  const perLayer = (side) => look[side].share_LHS.map((heads) => {
    const slots = look.slots.map((_, s) => average(heads.map((row) => row[s])));
    return [...slots, Math.max(0, 1 - sum(slots))];
  });
  const parts = [...look.slots.map((name, s) => ({ name, colour: slotColour(s + 1), ink: slotInk(s + 1) })), { name: "other tokens", colour: "var(--other)", ink: "var(--ink)" }];
  section.append(shares({ title: "By layer, mean over heads", names: layerNumbers, parts, before: perLayer("before"), after: perLayer("after") }),
    html("h3", {}, "By layer and head"), html("div", { class: "controls" }, chooser.label),
    html("div", { class: "legend" }, "Share", legendOf(SCALES.share), "Change in points", legendOf(SCALES.points)),
    html("div", { class: "figures" }, grids.map((one) => one.figure)));
}

function drawVertical(section, open) {
  heading(section, "vertical-title", "Vertical heads",
    "A head is vertical when at least 90 % of the rows of its map have their largest weight on a special token. " +
    "The published count takes the first and the last column; the variant takes all special tokens, a separator in the middle too. " + where);
  const CRITERIA = [["vertical_LH", "first and last column, as published"], ["vertical_all_LH", "all special tokens"]];
  const charts = CRITERIA.map(([key, name]) => lines({
    title: `Vertical heads of a layer: ${name}`, names: layerNumbers, low: 0, high: H, text: count,
    series: [
      { name: "without the adapter", values: look.before[key].map(sum), colour: "var(--before)", marker: 2, dashed: true },
      { name: "with the adapter", values: look.after[key].map(sum), colour: "var(--after)", marker: 0 },
    ],
  }));
  let chosen = 0;
  const value = (side) => (l, h) => look[side][CRITERIA[chosen][0]][l][h];
  const said = (x) => (many ? `in ${percent(x)} of the texts` : x ? "vertical" : "not vertical");
  const grids = [["before", "Without the adapter"], ["after", "With the adapter"]].map(([side, title]) => squares({
    title, rows: layerNumbers, columns: headNumbers, value: value(side), text: (x) => (many ? percent(x) : x ? "yes" : "no"), scale: () => SCALES.share, pick: open,
    say: (l, h) => `Layer ${l + 1}, head ${h + 1}: ${said(value("before")(l, h))} without, ${said(value("after")(l, h))} with the adapter`,
  }));
  const chooser = choice("Criterion", CRITERIA.map(([, name]) => name), 0, (i) => { chosen = i; for (const one of grids) one.draw(); });
  section.append(html("div", { class: "figures", style: "--least:20rem" }, charts), html("h3", {}, "Which heads"),
    html("div", { class: "controls" }, chooser.label),
    many ? html("div", { class: "legend" }, "Share of the texts in which the head is vertical", legendOf(SCALES.share)) : "",
    html("div", { class: "figures" }, grids.map((one) => one.figure)));
}

function drawOutputs(section, open) {
  heading(section, "outputs-title", "What each head puts out",
    `How far the output of a head moves, as a multiple of its length without the adapter: 1 × is a change as large as the output itself. What the layers below have changed is part of it. A head that looked at a special token often puts out next to nothing, so a small push makes a large factor. ${where}`);
  const { first_LH, mean_LH } = look.change;
  const scale = factorScale(Math.max(...first_LH.flat(), ...mean_LH.flat()));
  const say = (l, h) => `Layer ${l + 1}, head ${h + 1}: ${times(first_LH[l][h])} at the first special token, ${times(mean_LH[l][h])} mean over tokens`;
  section.append(html("div", { class: "legend" }, "Change relative to the output", legendOf(scale)),
    html("div", { class: "figures" }, [["At the first special token", first_LH], ["Mean over all tokens", mean_LH]].map(([title, grid]) =>
      squares({ title, rows: layerNumbers, columns: headNumbers, value: (l, h) => grid[l][h], text: times, scale: () => scale, say, pick: open }).figure)));
}

function drawVectors(section) {
  const vectors = look.vectors;
  if (!vectors) {
    heading(section, "vectors-title", "Learned vectors", `The method “${look.method}” learns no vectors for tokens, so there are none to show.`);
    return;
  }
  heading(section, "vectors-title", "Learned vectors", `${vectors.about} Beside it stands the state that is changed. ${where}`);
  const { layers, names } = vectors, V = names.length;
  const layerNames = layers.map((l) => String(l + 1));
  const series = (grid) => names.map((name, v) => ({ name, values: grid.map((row) => row[v]) }));
  const pairs = range(V).flatMap((a) => range(a).map((b) => [b, a]))
    .filter(([a, b]) => vectors.slot_cosine_LVV.some((grid) => grid[a][b] !== null)); // of one layer at least
  const chart = (title, drawn, rest) => lines({ title, names: layerNames, series: drawn, text: (x) => fixed(x), low: 0, ...rest });
  const charts = [
    chart("Length of the vector over length of the state", series(vectors.ratio_LV), { text: times }),
    chart("Length of the vector", series(vectors.norm_LV)),
    chart("Cosine with the mean state of its tokens", series(vectors.state_cosine_LV), { low: -1, high: 1 }),
  ];
  if (pairs.length && pairs.length <= MOST_PAIRS) charts.push(chart(
    pairs.length > 1 ? "Cosine between vectors of a layer" : `Cosine between ${names[0]} and ${names[1]} of a layer`,
    pairs.map(([a, b]) => ({ name: `${names[a]} and ${names[b]}`, values: vectors.slot_cosine_LVV.map((grid) => grid[a][b]) })), { low: -1, high: 1 }));
  if (vectors.scale_norm_LV) charts.push(
    chart("Length of what the scale adds over length of the state", series(vectors.scale_ratio_LV), { text: times }),
    chart("Length of the scale, 0 where nothing is scaled", series(vectors.scale_norm_LV)));
  if (vectors.product_norm_L) charts.push(
    chart("Length of the product over length of the state, every token", [{ name: "product", values: vectors.product_ratio_L }], { text: times }),
    chart("Norm of the matrix behind the product (Frobenius)", [{ name: "product", values: vectors.product_norm_L }]));
  section.append(html("div", { class: "figures", style: "--least:min(26rem, 90vw)" }, charts));
  if (pairs.length > MOST_PAIRS) section.append(...betweenVectors(vectors, layerNames));
  // of a slot that has a vector in one layer only there is nothing to compare
  const compared = range(V).filter((v) => vectors.norm_LV.filter((row) => row[v] !== null).length > 1);
  if (!compared.length) return;
  section.append(html("h3", {}, "Cosine between the vectors of two layers"), html("div", { class: "legend" }, legendOf(SCALES.cosine)),
    html("div", { class: "figures", style: "--least:15rem" }, compared.map((v) => squares({
      title: names[v], rows: layerNames, columns: layerNames, scale: () => SCALES.cosine, text: fixed, cells: layers.length > 12 ? 20 : 30, letters: 9.5, zoom: 1.25,
      value: (a, b) => vectors.layer_cosine_VLL[v][a][b], write: layers.length > 12 ? null : (x) => fixed(x, 1), hint: "Rows and columns are layers.",
      say: (a, b) => `Layers ${layerNames[a]} and ${layerNames[b]}: ${fixed(vectors.layer_cosine_VLL[v][a][b])}`,
    }).figure)));
}
const MOST_PAIRS = 6; // whose cosines can be told apart as lines
// The cosines of many vectors: squares for a layer that one chooses.
function betweenVectors(vectors, layerNames) {
  const { names } = vectors, V = names.length;
  let layer = 0;
  const value = (a, b) => vectors.slot_cosine_LVV[layer][a][b];
  const grid = squares({
    title: "By pair", rows: names, columns: range(V).map((v) => String(v + 1)), corner: "vector", value, text: fixed, scale: () => SCALES.cosine,
    cells: V > 20 ? 14 : 26, left: 8 + 6.2 * Math.max(...names.map((name) => name.length)), write: V > 20 ? null : (x) => fixed(x, 1),
    hint: "Columns are in the order of the rows.", say: (a, b) => `Layer ${layerNames[layer]}, ${names[a]} and ${names[b]}: ${fixed(value(a, b))}`,
  });
  const chooser = choice("Layer", layerNames, 0, (l) => { layer = l; grid.draw(); });
  return [html("h3", {}, "Cosine between vectors of a layer"), html("div", { class: "controls" }, chooser.label),
    html("div", { class: "legend" }, legendOf(SCALES.cosine)), grid.figure];
}

drawHeader();
const open = drawAttention(byId("attention"));
drawShare(byId("share"), open);
drawVertical(byId("vertical"), open);
drawOutputs(byId("outputs"), open);
drawVectors(byId("vectors"));
retheme();
