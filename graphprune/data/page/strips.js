/* -- strips -------------------------------------------------------------------------------------- */

function sizeOf(axis) {
  if (typeof axis === "number") return axis;
  if ("g" in axis) return groups[axis.g].s;
  if ("f" in axis) return axis.s;
  if ("p" in axis) return axis.p.reduce((product, part) => product * sizeOf(part), 1);
  return axis["+"].reduce((sum, part) => sum + sizeOf(part), 0);
}

const label = () => make("span", { class: "label" });  // filled by `fit`

function strip(axis) {
  const grow = { "flex-grow": sizeOf(axis) };
  if (typeof axis === "number") return make("span", { class: "seg fixed", "data-full": number(axis), style: grow }, label());
  if ("p" in axis) return make("span", { class: "stack", style: grow }, ...axis.p.map(strip));
  if ("+" in axis) return make("span", { class: "row", style: grow }, ...axis["+"].map(strip));
  if ("f" in axis) {
    const reason = reasons[axis.f];
    return make("button", { class: "seg frozen", "data-f": axis.f, "data-full": number(axis.s), style: grow,
      title: `${number(axis.s)} frozen: ${reason.w}` }, label());
  }
  const group = groups[axis.g];
  const ticks = group.s > 1 && group.s <= 64;
  return make("button", { class: ticks ? "seg ticks" : "seg", "data-g": axis.g, "data-gs": axis.g,
    "data-full": `${group.b} ${units(axis.g)}`, "data-short": group.b,
    title: `${group.n}: ${units(axis.g)} units, ${group.x}`, style: { ...grow, "--h": hue(axis.g), "--n": group.s } }, label());
}

/* Labels that fit: all of it, else the name alone, else nothing; a number is never cut. */
function fit(within) {
  let open = [...within.querySelectorAll(".seg[data-full]")].filter(seg => seg.offsetParent !== null);
  for (const form of ["full", "short", ""]) {
    for (const seg of open) seg.firstChild.textContent = form ? seg.dataset[form] ?? "" : "";
    open = open.filter(seg => seg.scrollWidth > seg.clientWidth);
  }
}
let fitting = 0;
function fitSoon() {
  cancelAnimationFrame(fitting);
  fitting = requestAnimationFrame(() => fit($("model")));
}

const groupsIn = axis => typeof axis === "number" || "f" in axis ? [] : "g" in axis ? [axis.g] : (axis.p ?? axis["+"]).flatMap(groupsIn);

/* Runs of an axis that lie one after the other: [start, size, groups]. */
function piecesOf(axis, start = 0) {
  if (typeof axis === "number" || !("+" in axis)) return [[start, sizeOf(axis), groupsIn(axis)]];
  return axis["+"].flatMap(part => {
    const found = piecesOf(part, start);
    start += sizeOf(part);
    return found;
  });
}

/* What shows the runs of indices that begin in a piece of an axis, however many there are; "" for none. */
function maskOf(runs, start, length) {
  const stops = [];
  for (let at = 0; at < runs.length; at += 2) {
    const from = 100 * (runs[at] - start) / length, to = from + Math.max(.15, 100 * runs[at + 1] / length);
    if (0 <= from && from < 100) stops.push(`#0000 ${from.toFixed(3)}%, #000 ${from.toFixed(3)}% ${to.toFixed(3)}%, #0000 ${to.toFixed(3)}%`);
  }
  return stops.length ? `linear-gradient(90deg, ${stops.join(", ")})` : "";
}

/* Strips are scaled by what can be pruned: a vocabulary would leave nothing of the rest. */
const prunable = weights.flatMap(weight => weight.s.filter((_, dim) => groupsIn(weight.t[dim]).length));
const largest = Math.max(1, ...(prunable.length ? prunable : weights.flatMap(weight => weight.s)));
function dimension(weight, dim) {
  const size = weights[weight].s[dim];
  const share = Math.min(100, Math.max(6, 100 * Math.sqrt(size / largest)));
  const axis = weights[weight].t[dim], pieces = piecesOf(axis);
  const bar = make("span", { class: size > largest ? "dim long" : "dim", style: { width: `${share}%` } }, strip(axis));
  const runs = plan?.gone[weight]?.[dim] ?? [];
  for (const [start, length, found] of pieces) {
    const mask = maskOf(runs, start, length);
    if (mask) bar.append(make("span", { class: "gone", "data-gs": found.join(" "), style: {
      left: `${100 * start / size}%`, right: `${100 - 100 * (start + length) / size}%`, "mask-image": mask } }));
  }
  return bar;
}

function weightRow(index, leaf, depth) {
  const { s: shape, k: kind } = weights[index];
  const after = plan?.shapes[index];
  return make("div", { class: "weight", "data-w": index, style: { "--depth": depth } },
    make("button", { title: weights[index].n, on: { click: () => showWeight(index) } }, ...breakable(leaf),
      make("small", {}, `${shape.join(" × ") || "scalar"}${kind === "parameter" ? "" : `, ${kind}`}`,
        after ? make("span", { class: "to" }, ` → ${after.join(" × ")}`) : null)),
    make("span", { class: "dims" }, ...shape.map((_, dim) => dimension(index, dim))));
}

/* -- the tree of modules, repeated blocks folded ------------------------------------------------- */

function tree() {
  const root = { name: "", path: "", children: new Map(), leaves: [] };
  weights.forEach((weight, index) => {
    const parts = weight.n.split(".");
    const leaf = parts.pop();
    let at = root;
    for (const part of parts) {
      if (!at.children.has(part))
        at.children.set(part, { name: part, path: at.path ? `${at.path}.${part}` : part, children: new Map(), leaves: [] });
      at = at.children.get(part);
    }
    at.leaves.push([leaf, index]);
  });
  measure(root);
  return root;
}

function measure(module) {
  module.params = module.after = 0;
  module.count = module.leaves.length;
  const parts = [];
  for (const [leaf, index] of module.leaves) {
    const { s: shape, k: kind, x: type } = weights[index];
    if (kind === "parameter") {
      module.params += count(shape);
      module.after += count(plan?.shapes[index] ?? shape);
    }
    parts.push(`${leaf}:${shape}:${type}`);
  }
  for (const child of module.children.values()) {
    measure(child);
    module.params += child.params;
    module.after += child.after;
    module.count += child.count;
    parts.push(`${child.name}{${child.signature}}`);
  }
  module.signature = parts.join(";");
}

function runsOf(module) {
  const runs = [];
  for (const child of module.children.values()) {
    const last = runs.at(-1);
    if (last && /^\d+$/.test(child.name) && /^\d+$/.test(last[0].name) && last[0].signature === child.signature) last.push(child);
    else runs.push([child]);
  }
  return runs;
}

function inside(module, depth = 0) {
  return [...module.leaves.map(([leaf, index]) => weightRow(index, leaf, depth)), ...runsOf(module).flatMap(run => {
    const plain = run.length === 1 && run[0].children.size === 0 && run[0].leaves.length <= 2;
    return plain ? run[0].leaves.map(([leaf, index]) => weightRow(index, `${run[0].name}.${leaf}`, depth)) : block(run, depth + 1);
  })];
}

/* Parameters of modules that are alike, before and after the plan: these may differ. */
function parametersOf(run) {
  const before = run[0].params, after = run.map(each => each.after);
  const [low, high] = [Math.min(...after), Math.max(...after)];
  const left = low === high ? number(low) : `${number(low)} to ${number(high)}`;
  const text = low === before && high === before ? number(before) : `${number(before)} → ${left}`;
  return `${text} parameters${run.length > 1 ? " each" : ""}`;
}

const blocks = new Map();  // path of a module -> how to open it
function block(run, depth) {
  const [first, last] = [run[0], run.at(-1)];
  const name = run.length > 1 ? `${first.name}–${last.name}` : first.name;
  const body = make("div");
  let shown = null;
  const show = index => { shown = index; body.replaceChildren(chooser(), ...inside(run[index], depth)); fitSoon(); };
  const showAll = () => { shown = -1; body.replaceChildren(chooser(), ...run.map(each => block([each], depth + 1))); fitSoon(); };
  function chooser() {
    if (run.length === 1) return "";
    const field = make("input", { type: "number", min: first.name, max: last.name, "aria-label": "block",
      value: shown >= 0 ? run[shown].name : first.name,
      on: { change: event => show(Math.max(0, run.findIndex(each => each.name === event.target.value))) } });
    return make("div", { class: "which" }, "block", field, `of ${run.length} alike`,
      make("button", { on: { click: shown === -1 ? () => show(0) : showAll } }, shown === -1 ? "fold" : "unfold"));
  }
  const open = index => { details.open = true; if (shown !== -1 && (shown !== index || shown === null)) show(index); };
  const details = make("details", { on: { toggle: () => { if (details.open && shown === null) show(0); fitSoon(); } } },
    make("summary", {}, make("b", {}, name),
      run.length > 1 ? make("span", { class: "repeat" }, `× ${run.length}`) : null,
      make("span", { class: "count" }, parametersOf(run))),
    body);
  run.forEach((each, index) => blocks.set(each.path, () => open(index)));
  const level = first.path.split(".").length;
  if (level <= (run.length > 1 ? 4 : 2) || (run.length === 1 && first.count <= 8)) { show(0); details.open = true; }
  return details;
}

