"use strict";
// State lives in the address (#layer=3&theme=dark), so that a view can be linked to.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const state = new URLSearchParams(location.hash.slice(1));

function remember(key, value) {
  state.set(key, value);
  history.replaceState(null, "", "#" + state);
}

// --- light and dark
const dark = matchMedia("(prefers-color-scheme: dark)");
const theme = () => document.documentElement.dataset.theme || (dark.matches ? "dark" : "light");

function show(name) {
  if (name === "light" || name === "dark") document.documentElement.dataset.theme = name;
  byId("theme").textContent = theme() === "dark" ? "☀ light" : "☾ dark";
}

byId("theme").addEventListener("click", () => {
  show(theme() === "dark" ? "light" : "dark");
  remember("theme", theme());
});
dark.addEventListener("change", () => show());

// --- one layer: where its channels went
const STOPS = [[47, 111, 219], [154, 161, 169], [229, 84, 27]];

function colour(share) {
  const [from, to, part] = share < 0.5 ? [STOPS[0], STOPS[1], share * 2] : [STOPS[1], STOPS[2], share * 2 - 1];
  return "rgb(" + from.map((value, i) => Math.round(value + (to[i] - value) * part)).join() + ")";
}

function short(value) {
  if (value === null) return "–";
  if (value < 1e-6) return "0"; // rounding
  if (value >= 1e5) return value.toExponential(1);
  return value >= 10 ? String(Math.round(value)) : String(Number(value.toPrecision(value < 0.01 ? 1 : 3)));
}

function element(name, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const key in attributes) made.setAttribute(key, attributes[key]);
  if (text !== undefined) made.textContent = text;
  return made;
}

function drawChannels(layer) {
  const width = Math.max(280, byId("channels").clientWidth || 900), top = 22, cell = 18, bottom = 152;
  const count = layer.channels, size = count / layer.groups;
  const gap = layer.groups > 1 ? Math.min(8, 0.3 * width / layer.groups) : 0;
  const order = layer.order || [...Array(count).keys()];
  const step = width / count, packed = (width - gap * (layer.groups - 1)) / count;
  const sorted = [...layer.deviation].sort((a, b) => a - b), known = sorted.length > 0;
  // from the 5 % to the 95 % quantile: a few dead channels would make all others look alike
  const low = sorted[Math.round(0.05 * (count - 1))], high = sorted[Math.round(0.95 * (count - 1))];
  const share = (value) => high > low ? Math.log(value / low) / Math.log(high / low) : 0.5;
  const shade = (c) => known ? colour(Math.min(1, Math.max(0, share(layer.deviation[c])))) : "#9aa1a9";
  const picture = element("svg", { viewBox: `0 0 ${width} ${bottom + cell + 30}`, role: "img",
    "aria-label": `Channels of ${layer.name} and their groups` });
  picture.append(element("text", { x: 0, y: 14, class: "tick" }, `${count} channels in the network's order`));
  order.forEach((c, place) => {
    const from = (c + 0.5) * step, to = (place + 0.5) * packed + gap * Math.floor(place / size), fill = shade(c);
    const title = element("title", {}, `channel ${c}, group ${Math.floor(place / size)}` +
      (known ? `, deviation ${short(layer.deviation[c])}` : "") + (layer.signs && layer.signs[c] < 0 ? ", sign turned" : ""));
    const curve = element("path", { fill: "none", stroke: fill, "stroke-width": Math.max(0.5, Math.min(2, packed * 0.6)),
      "stroke-opacity": count > 200 ? 0.45 : 0.75,
      d: `M${from} ${top + cell}C${from} ${top + 75} ${to} ${bottom - 55} ${to} ${bottom}` });
    curve.append(title);
    picture.append(curve, element("rect", { x: c * step, y: top, width: step + 0.2, height: cell, fill }));
    picture.append(element("rect", { x: to - packed / 2, y: bottom, width: packed + 0.2, height: cell, fill }));
    if (layer.signs && layer.signs[c] < 0)
      picture.append(element("rect", { x: to - packed / 2, y: bottom + cell + 2, width: packed, height: 4,
        style: "fill:var(--ink)" }));
  });
  const signs = layer.signs ? "; a bar below: the sign is turned" : "";
  const groups = layer.groups === 1 ? "one group" : `${layer.groups} groups of ${size}`;
  picture.append(element("text", { x: 0, y: bottom + cell + 24, class: "tick" }, groups + signs));
  byId("channels").replaceChildren(picture);
  byId("quiet").textContent = known ? `quiet, up to ${short(low)}` : "";
  byId("loud").textContent = known ? `from ${short(high)}, loud` : "no running statistics";
}

function choose(index) {
  const layer = data.layers[index];
  if (!layer) return;
  byId("layer").value = index;
  drawChannels(layer);
  byId("about").textContent = `${layer.channels} channels, ${layer.groups === 1 ? "one group" : layer.groups + " groups"}, ` +
    `softness ${short(layer.softness)}. ${layer.reason}.`;
  byId("numbers").replaceChildren(...layer.stages.map((stage) => {
    const row = document.createElement("tr");
    const range = stage.variance ? `${short(stage.variance[0])} to ${short(stage.variance[4])}` : "–";
    for (const text of [stage.name, short(stage.error), range, short(stage.shift)]) {
      const cell = document.createElement("td");
      cell.textContent = text;
      if (row.children.length) cell.className = "n";
      row.append(cell);
    }
    return row;
  }));
  document.querySelectorAll(".column").forEach((column) =>
    column.classList.toggle("chosen", column.dataset.layer === String(index)));
}

function pick(index) {
  choose(index);
  remember("layer", index);
}

show(state.get("theme"));
if (data.layers.length) {
  const current = () => Number(byId("layer").value);
  byId("layer").addEventListener("change", () => pick(current()));
  byId("before").addEventListener("click", () => pick((current() + data.layers.length - 1) % data.layers.length));
  byId("after").addEventListener("click", () => pick((current() + 1) % data.layers.length));
  document.querySelectorAll(".column").forEach((column) =>
    column.addEventListener("click", () => pick(Number(column.dataset.layer))));
  choose(Number(state.get("layer") || data.start));
  if (!byId("channels").firstChild) choose(data.start);
  addEventListener("resize", () => drawChannels(data.layers[current()]));
  addEventListener("hashchange", () => {
    const asked = new URLSearchParams(location.hash.slice(1));
    show(asked.get("theme"));
    if (asked.has("layer")) choose(Number(asked.get("layer")));
  });
}
