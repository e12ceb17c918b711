/* -- the graph of one block: its weights in the middle, groups on both sides ------------------------ */

const ROW = 40, NODE = 32;

/* What a graph can show: the blocks of every run of repeated ones, and other modules of a fair size. */
function views(root) {
  const found = [];
  const add = (label, module) => { if (module.count >= 2 && module.count <= 60) found.push({ label, module }); };
  const visit = module => {
    for (const run of runsOf(module)) {
      add(run.length > 1 ? `${run[0].path} (${run.length} alike)` : run[0].path, run[0]);
      visit(run[0]);
    }
  };
  add("the whole model", root);
  visit(root);
  return found;
}

const weightsOf = module => [...module.leaves.map(([, index]) => index), ...[...module.children.values()].flatMap(weightsOf)];

const reach = groups.map(group => new Set(group.m.map(member => member[0])));

/* Edges between the weights of a module and the groups in them: [group, place of the weight, dimensions]. */
function edgesOf(indices) {
  const places = new Map(indices.map((index, place) => [index, place]));
  return groups.flatMap((group, at) => {
    const dims = new Map();
    for (const [weight, dim, , , , owner] of group.m)
      if (places.has(weight)) dims.set(weight, new Set([...(dims.get(weight) ?? []), owner < 0 ? dim : "all"]));
    return [...dims].map(([weight, found]) => [at, places.get(weight), [...found].sort().join(", ")]);
  });
}

/* Groups of a side from top to bottom, each as near to the middle of its weights as the others let it. */
function spread(side, wanted, rows) {
  side.sort((left, right) => wanted.get(left) - wanted.get(right));
  const tops = side.map(group => wanted.get(group));
  for (let at = 1; at < tops.length; at++) tops[at] = Math.max(tops[at], tops[at - 1] + 1.35);
  const over = tops.length ? tops.at(-1) - Math.max(rows - 1, 1.35 * (tops.length - 1)) : 0;
  if (over > 0) for (let at = tops.length - 1, most = tops.at(-1) - over; at >= 0; at--, most -= 1.35) tops[at] = Math.min(tops[at], most);
  return tops;
}

function drawGraph(box, module) {
  const isIn = index => weights[index].k === "parameter" || groups.some((_, group) => reach[group].has(index));
  const indices = weightsOf(module).filter(isIn), edges = edgesOf(indices);
  const inside = new Set(indices), used = [...new Set(edges.map(edge => edge[0]))];
  const wanted = new Map(used.map(group => {
    const rows = edges.filter(edge => edge[0] === group).map(edge => edge[1]);
    return [group, rows.reduce((sum, row) => sum + row, 0) / rows.length];
  }));
  // On the left what goes on outside, or runs through most of what is shown.
  const isLocal = group => {
    const rows = edges.filter(edge => edge[0] === group).map(edge => edge[1]);
    return [...reach[group]].every(weight => inside.has(weight)) && Math.max(...rows) - Math.min(...rows) < Math.max(4, .6 * indices.length);
  };
  const sides = [used.filter(group => !isLocal(group)), used.filter(isLocal)];
  const width = Math.max(300, box.clientWidth), narrow = width < 640;
  box.classList.toggle("narrow", narrow);
  const columns = narrow ? [0, .32, .77] : [0, .34, .72], widths = narrow ? [.23, .35, .23] : [.2, .26, .28];
  const tops = new Map(sides.flatMap(side => { const found = spread(side, wanted, indices.length); return side.map((group, at) => [group, found[at]]); }));
  const rows = Math.max(indices.length, ...[...tops.values()].map(top => top + 1));
  const y = row => 26 + row * ROW, x = column => columns[column] * width, end = column => x(column) + widths[column] * width;
  // Edges of one side of a weight leave it one below the other, in the order of where they lead.
  const port = ([group, row]) => {
    const side = sides.find(each => each.includes(group));
    const all = edges.filter(edge => edge[1] === row && side.includes(edge[0])).map(edge => edge[0]).sort((left, right) => tops.get(left) - tops.get(right));
    return NODE * (all.indexOf(group) + 1) / (all.length + 1);
  };
  const prefix = module.path ? `${module.path}.` : "";
  const names = indices.map(index => weights[index].n.slice(prefix.length).replace(/\.weight$/, ""));
  // In a narrow window only the end of a name that tells it from all others.
  const ends = name => name.split(".").map((_, at, parts) => parts.slice(-1 - at).join("."));
  const isOnly = end => names.filter(name => `.${name}`.endsWith(`.${end}`)).length === 1;
  const labels = narrow ? names.map(name => ends(name).find(isOnly) ?? name) : names;
  const paths = edges.map(edge => {
    const [group, row, dims] = edge, left = sides[0].includes(group);
    const [from, to] = left ? [end(0), x(1)] : [end(1), x(2)];
    const ofGroup = y(tops.get(group)) + NODE / 2, ofWeight = y(row) + port(edge);
    const [top, bottom] = left ? [ofGroup, ofWeight] : [ofWeight, ofGroup];
    const bend = (to - from) / 2, at = left ? to - 5 : from + 5;
    return `<path class="edge" data-gs="${group}" style="--h:${hue(group)}" d="M${from} ${top}C${from + bend} ${top} ${to - bend} ${bottom} ${to} ${bottom}"/>` +
      `<text class="edge" data-gs="${group}" x="${at}" y="${ofWeight - 2}" text-anchor="${left ? "end" : "start"}">${dims}</text>`;
  });
  const head = (text, column) => make("span", { class: "head", style: { left: `${x(column)}px`, width: `${widths[column] * width}px` } }, text);
  const node = (column, row, attributes, ...children) => make("button", { ...attributes, class: `node lit ${attributes.class}`, style: {
    ...attributes.style, left: `${x(column)}px`, top: `${y(row)}px`, width: `${widths[column] * width}px`, height: `${NODE}px` } }, ...children);
  const picture = make("div", { class: "edges" });
  picture.innerHTML = `<svg width="${width}" height="${y(rows)}" aria-hidden="true">${paths.join("")}</svg>`;
  box.style.setProperty("height", `${y(rows) + 4}px`);
  box.replaceChildren(picture, head("wide groups", 0), head(narrow ? "weights" : "weights, and which dimensions", 1), head(narrow ? "own groups" : "groups of this part", 2),
    ...indices.map((index, row) => {
      const own = edges.filter(edge => edge[1] === row).map(edge => edge[0]), after = plan?.shapes[index];
      return node(1, row, { class: own.length ? "of-weight" : "of-weight bare", "data-w": index, "data-gs": own.join(" "), title: `${weights[index].n} ${weights[index].x}` },
        make("b", {}, make("bdi", {}, labels[row])),
        make("small", {}, narrow && after ? "" : weights[index].s.join(" × "), after ? make("span", { class: "to" }, ` → ${after.join(" × ")}`) : null));
    }),
    ...used.map(group => node(sides[0].includes(group) ? 0 : 2, tops.get(group), { class: `of-group ${groups[group].x}`, "data-g": group, "data-gs": group,
      style: { "--h": hue(group) }, title: `${groups[group].n}: ${units(group)} units, ${groups[group].x}` },
      make("b", {}, groups[group].r), make("small", {}, `${units(group)}${narrow || groups[group].x === "exact" ? "" : `, ${groups[group].x}`}`))));
}

function graphOf(root) {
  const all = views(root);
  if (!groups.length || !all.length) return null;
  const first = all.find(view => view.label.endsWith("alike)")) ?? all.find(({ module: { count } }) => count > 3 && count <= 16) ?? all[0];
  const box = make("div", { class: "graph" });
  const chosen = make("select", { "aria-label": "block" }, ...all.map((view, at) =>
    make("option", { value: at, selected: view === first }, view.label)));
  const draw = () => drawGraph(box, all[+chosen.value].module);
  chosen.addEventListener("change", draw);
  const details = make("details", { class: "drawn", open: true, on: { toggle: () => { if (details.open) draw(); } } },
    make("summary", {}, make("b", {}, "Graph of "), chosen), box);
  let before = 0;
  new ResizeObserver(() => { if (box.clientWidth && box.clientWidth !== before) { before = box.clientWidth; draw(); } }).observe(box);
  return details;
}

