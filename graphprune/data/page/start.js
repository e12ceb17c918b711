/* -- search -------------------------------------------------------------------------------------- */

function reveal(index) {
  const parts = weights[index].n.split(".").slice(0, -1);
  for (let depth = 1; depth <= parts.length; depth++) blocks.get(parts.slice(0, depth).join("."))?.();
  const row = $("model").querySelector(`.weight[data-w="${index}"]`);
  for (const old of $("model").querySelectorAll(".found")) old.classList.remove("found");
  row?.classList.add("found");
  row?.scrollIntoView({ block: "center" });
}

function searchFor(text) {
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  if (!words.length) return showStart();
  const matches = name => words.every(word => name.toLowerCase().includes(word));
  const inGroups = groups.flatMap((group, at) => matches(`${group.n} ${group.r}`) ? [at] : []);
  const inWeights = weights.flatMap((weight, at) => matches(weight.n) ? [at] : []);
  panel(function search() { searchFor(text); }, null, make("h2", {}, `“${text}”`),
    make("h3", {}, `${number(inGroups.length)} groups`), make("ul", {}, ...inGroups.slice(0, 100).map(at => make("li", {}, groupLink(at)))),
    make("h3", {}, `${number(inWeights.length)} weights`), make("ul", {}, ...inWeights.slice(0, 100).map(at => make("li", {}, weightLink(at)))));
}

$("search").addEventListener("input", event => searchFor(event.target.value.trim()));
document.addEventListener("keydown", event => {
  if (event.key === "/" && !/^(INPUT|SELECT)$/.test(document.activeElement.tagName)) { event.preventDefault(); $("search").focus(); }
  if (event.key === "Escape") { $("search").value = ""; showStart(); }
});
$("theme").addEventListener("click", () => {
  const dark = getComputedStyle(document.documentElement).colorScheme === "dark" ||
    (document.documentElement.dataset.theme === undefined && matchMedia("(prefers-color-scheme: dark)").matches);
  document.documentElement.dataset.theme = dark ? "light" : "dark";
});

/* What the patterns mean; a color for each group is said in the overview. */
function legend() {
  const entry = (look, text) => make("span", {}, make("span", { class: `sample ${look}` }, look.includes("lost") ? make("span", { class: "gone" }) : null), text);
  return make("p", { class: "legend", "aria-label": "legend" }, entry("held", "can be pruned"), entry("frozen", "frozen"), weights.some(weight => weight.s.includes(1)) ? entry("fixed", "of size 1") : null,
    plan ? entry("held lost", "goes by the plan") : null,
    ...["rescaled", "approximate"].filter(each => groups.some(group => group.x === each)).map(each => entry(`of-group ${each}`, `removal is ${each}`)));
}

/* -- start --------------------------------------------------------------------------------------- */

$("title").textContent = doc.class ? `${doc.title}: ${doc.class}` : doc.title;
if (doc.costs) {
  const { params, macs, kv_bytes } = doc.costs, after = plan?.costs ?? {};
  const facts = [["parameters", params, after.params], [`MACs${perTokens}`, macs], ["KV bytes per token", kv_bytes, after.kv_bytes],
    ["groups", groups.length]].filter(fact => fact[1]);
  $("facts").append(...facts.map(([what, value, left = value]) => make("span", { class: "fact" }, make("b", {}, number(value)),
    left === value ? null : make("b", { class: "to" }, ` → ${number(left)}`), ` ${what}`)));
}
const root = tree();
if (doc.problem) $("model").append(make("p", { class: "problem", role: "alert" }, doc.problem));
$("model").append(...[...(doc.notes ?? []).map(note => make("p", { class: "note" }, note)), groups.length ? legend() : null, graphOf(root),
  ...inside(root)].filter(each => each !== null));
showStart();
document.body.classList.add("lowered");  // in a narrow window the model comes first
fit($("model"));
new ResizeObserver(fitSoon).observe($("model"));
const header = document.querySelector("header");
new ResizeObserver(() => document.documentElement.style.setProperty("--header", `${header.offsetHeight}px`)).observe(header);
$("lower").addEventListener("click", () => document.body.classList.toggle("lowered"));
