/* -- details ------------------------------------------------------------------------------------- */

const link = (text, handler) => make("button", { on: { click: handler } }, text);
const weightLink = index => link(weights[index].n, () => { reveal(index); showWeight(index); });
const groupLink = index => make("span", {}, make("span", { class: "swatch", style: { "--h": hue(index) } }),
  link(groups[index].n, () => showGroup(index)));
const share = (part, whole) => whole ? `${(100 * part / whole).toPrecision(3)} %` : "0 %";

/* What the panel has shown, so that there is a way back; `again` shows it anew. */
let current = null, trail = [];
function panel(again, selector, ...children) {
  if (current && current !== again && current.name !== "search") trail.push(current);
  current = again;
  pinned = selector;
  lightUp(selector);
  const back = () => { const to = trail.pop() ?? showStart; current = null; to(); };
  $("panel").replaceChildren(...[
    again === showStart ? null : make("nav", {}, trail.length ? link("← back", back) : null, link("overview", showStart)),
    ...children].filter(child => child !== null));
  $("panel").scrollTop = 0;
  document.body.classList.remove("lowered");
}

function showGroup(index) {
  const group = groups[index], { costs } = doc;
  const members = [...new Set(group.m.map(member => member[0]))];
  const least = group.l ?? 1;
  const rows = [["parameters", group.c[0], costs.params], [`multiply-accumulates${perTokens}`, group.c[1], costs.macs],
    ["bytes of KV cache per token", group.c[2], costs.kv_bytes]].filter(row => row[2]);
  panel(() => showGroup(index), ofGroup(index),
    make("h2", {}, make("span", { class: "swatch", style: { "--h": hue(index) } }), group.n),
    make("p", { class: "note" }, `${number(group.s)} units, ${group.r}; removal is ${group.x}${group.w ? `: ${group.w}` : ""}.`),
    going(index),
    make("p", {}, group.s > least ? `Up to ${number(group.s - least)} may go` : "None may go",
      group.p ? ", equally many under each unit of " : ".", ...(group.p ?? []).map(groupLink)),
    make("h3", {}, "What a unit saves, and all of them"),
    make("table", {}, ...rows.map(([what, unit, whole]) => make("tr", {}, make("td", {}, what),
      make("td", { class: "n" }, number(unit)), make("td", { class: "n" }, share(unit * group.s, whole))))),
    make("h3", {}, `Members (${group.m.length})`), unitTable(group),
    make("h3", {}, "Why they are coupled"), chain(group, members));
}

/* What the plan does to a group: "88 of 704 go". */
function going(index) {
  const { s: size, p: parents } = groups[index], merged = plan?.merged[index];
  if (merged !== undefined) return make("p", { class: "to" }, `${number(size)} become ${number(merged)}`);
  if (!gone(index)) return plan ? make("p", { class: "note" }, "The plan takes none.") : null;
  const under = parents ? ` under each unit of ${parents.map(parent => groups[parent].r).join(" and ")}` : "";
  return make("p", { class: "to" }, `${number(gone(index))} of ${number(size)} go${under}`);
}

function unitTable(group) {
  const field = make("input", { type: "number", min: 0, max: group.s - 1, value: 0, "aria-label": "unit", style: { width: "5rem" } });
  const body = make("tbody");
  const fill = () => {
    const unit = Math.min(group.s - 1, Math.max(0, +field.value || 0));
    body.replaceChildren(...group.m.slice(0, 400).map(([weight, dim, offset, width, outer, owner]) => make("tr", {},
      make("td", {}, weightLink(weight), make("br"),
        make("code", {}, owner < 0 ? formula(offset, width, outer, dim) : `whole, of unit ${owner}`)),
      make("td", { class: "n" }, owner < 0 ? indices(unit, offset, width, outer) : owner === unit ? "all" : "none"))));
  };
  field.addEventListener("input", fill);
  fill();
  return make("div", {}, make("table", {}, make("thead", {}, make("tr", {}, make("th", {}, "weight and map"),
    make("th", { class: "n" }, "unit ", field))), body),
    group.m.length > 400 ? `and ${group.m.length - 400} more` : "");
}

function formula(offset, width, outer, dim) {
  const loops = outer.map(([size, stride, parent]) => ` + ${stride}·${parent >= 0 ? groups[parent].b : `[0,${size})`}`).join("");
  return `dim ${dim}: ${offset}${loops} + ${width}·u${width > 1 ? ` + [0,${width})` : ""}`;
}

function indices(unit, offset, width, outer) {
  let starts = [offset + unit * width];
  for (const [size, stride] of outer) {
    starts = starts.flatMap(start => Array.from({ length: Math.min(size, 64) }, (_, at) => start + at * stride));
    if (starts.length > 64) starts = starts.slice(0, 64);
  }
  starts.sort((left, right) => left - right);
  const shown = starts.slice(0, 6).map(start => width > 1 ? `${start}–${start + width - 1}` : String(start));
  return shown.join(", ") + (starts.length > 6 ? ", …" : "");
}

function chain(group, members) {
  if (members.length < 2) return make("p", { class: "note" }, "It lies in one weight.");
  const steps = new Map(group.t.map(([value, operator, before]) => [value, [operator, before]]));
  const walk = value => { const path = [value]; while (steps.has(value)) { value = steps.get(value)[1]; path.push(value); } return path; };
  const choose = (chosen, label) => make("select", { "aria-label": label, style: { width: "100%" } },
    ...members.slice(0, 500).map((weight, at) => make("option", { value: at, selected: at === chosen }, weights[weight].n)));
  const from = choose(0, "from"), to = choose(members.length - 1, "to"), list = make("ol");
  const fill = () => {
    const up = walk(+from.value), down = walk(+to.value);
    if (up.at(-1) !== down.at(-1)) return list.replaceChildren(make("li", {}, "The units of one are picked in the other by an index that is chosen at run time."));
    while (up.length > 1 && down.length > 1 && up.at(-2) === down.at(-2)) { up.pop(); down.pop(); }
    const used = [...up.slice(0, -1).map(value => steps.get(value)[0]), ...down.slice(0, -1).reverse().map(value => steps.get(value)[0])];
    const once = used.filter((operator, at) => operator !== used[at - 1]);
    list.replaceChildren(...once.map(operator => {
      const [name, module, line] = operators[operator];
      return make("li", {}, make("code", {}, name), module ? ` in ${module}` : "", line ? make("small", { class: "fact" }, ` ${line}`) : null);
    }));
  };
  from.addEventListener("change", fill);
  to.addEventListener("change", fill);
  fill();
  return make("div", {}, from, to, list);
}

function showReason(index) {
  const reason = reasons[index];
  const held = weights.flatMap((weight, at) => JSON.stringify(weight.t).includes(`"f":${index},`) ? [at] : []);
  panel(() => showReason(index), ofReason(index), make("h2", {}, "Frozen"), make("p", {}, reason.w), reason.a ? make("p", {}, make("code", {}, reason.a)) : null,
    make("h3", {}, `In ${held.length} weights`), make("ul", {}, ...held.slice(0, 200).map(at => make("li", {}, weightLink(at)))));
}

function showWeight(index) {
  const weight = weights[index];
  const own = groups.flatMap((group, at) => group.m.some(member => member[0] === index) ? [at] : []);
  const after = plan?.shapes[index];
  panel(() => showWeight(index), null, make("h2", {}, weight.n), make("p", {}, make("code", {}, weight.x || "not analyzed")),
    make("p", { class: "note" }, `${weight.k}, ${weight.s.join(" × ") || "scalar"}${weight.tied ? `; tied: ${weight.tied.join(", ")}` : ""}`),
    after ? make("p", { class: "to" }, count(after) ? `${after.join(" × ")} after the plan` : "goes as a whole") : null,
    own.length ? make("h3", {}, "Groups") : null, own.length ? make("ul", {}, ...own.map(at => make("li", {}, groupLink(at)))) : null);
}

const operatorAt = reason => reason.a.split(" in ")[0];

function showStart() {
  const roles = new Map();
  groups.forEach((group, index) => roles.set(group.r, [...(roles.get(group.r) ?? []), index]));
  const several = (found, text) => {
    const all = [...new Set(found.map(text))];
    return all.slice(0, 4).join(", ") + (all.length > 4 ? ", …" : "");
  };
  trail = [];
  panel(showStart, null,
    make("h2", {}, "Coupled groups"),
    make("p", { class: "note" }, "Each strip is an axis of a weight; its width grows with the square root of its size. What has one color loses its units together. Point at a strip or at a node of the graph, or click it."),
    plan ? planned() : null, plan ? make("h3", {}, "All groups") : null,
    make("table", {}, make("tr", {}, ...["role", "groups", "units", "removal is"].map((text, at) => make("th", { class: at === 1 || at === 2 ? "n" : null }, text))),
      ...[...roles].map(([role, found]) => make("tr", {}, make("td", {}, found.length === 1 ? groupLink(found[0])
        : make("details", { style: { margin: 0 } }, make("summary", {}, role), make("ul", {}, ...found.slice(0, 400).map(at => make("li", {}, groupLink(at)))))),
        make("td", { class: "n" }, number(found.length)),
        make("td", { class: "n" }, several(found, units)),
        make("td", {}, several(found, at => groups[at].x))))),
    reasons.length ? make("h3", {}, "What is frozen, and why") : null,
    make("ul", {}, ...[...new Map(reasons.map((reason, at) => [`${reason.w} ${operatorAt(reason)}`, at]))].slice(0, 60).map(([, at]) =>
      make("li", {}, link(reasons[at].w, () => showReason(at)), " ", reasons[at].a ? make("code", { class: "fact" }, operatorAt(reasons[at])) : null))));
}

function planned() {
  const words = { plain: "Plain transformers loads the result.", "remote-code": "transformers loads the result with trust_remote_code=True", none: "No checkpoint of transformers holds the result" };
  const { kind, why } = plan.loads ?? {};
  const layers = new Map();
  for (const [index, after] of Object.entries(plan.shapes)) {
    const path = weights[index].n.match(/^(?:.*?\.)?\d+(?=\.)/)?.[0] ?? weights[index].n.split(".").slice(0, -1).join(".");
    layers.set(path, [...(layers.get(path) ?? []), [+index, after]]);
  }
  const alike = new Map();  // layers that lose the same are one line
  for (const [path, rows] of layers) {
    const key = JSON.stringify(rows.map(([index, after]) => [weights[index].n.slice(path.length), weights[index].s, after]));
    alike.set(key, [...(alike.get(key) ?? []), [path, rows]]);
  }
  const title = found => found.length === 1 ? found[0][0] : `${found[0][0]} to ${found.at(-1)[0].split(".").at(-1)} (${found.length} alike)`;
  return make("div", {}, make("h3", {}, "The plan"),
    make("p", {}, `Parameters ${number(doc.costs.params)} → `, make("b", {}, number(plan.costs.params)),
      ` (${share(plan.costs.params, doc.costs.params)})`, doc.costs.kv_bytes ? `; KV bytes per token ${number(doc.costs.kv_bytes)} → ` : "",
      doc.costs.kv_bytes ? make("b", {}, number(plan.costs.kv_bytes)) : ""),
    kind ? make("p", { class: "note" }, words[kind] + (why ? `: ${why}` : "")) : null,
    ...[...alike.values()].map(found => make("details", { style: { margin: 0 } }, make("summary", {}, `${title(found)}: ${found[0][1].length} weights`),
      make("table", {}, ...found[0][1].map(([index, after]) => make("tr", {}, make("td", {}, weightLink(index)),
        make("td", { class: "n" }, weights[index].s.join(" × "), make("br"), make("span", { class: "to" }, `→ ${after.join(" × ")}`))))))));
}

