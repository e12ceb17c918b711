"use strict";
/* The document (graphprune/report/html_page.py):
   weights: n name, s shape, k kind, x type as text, tied names,
            t axes: a number (fixed), {g: group}, {f: reason, s: size}, {p: [factors]} or {"+": [terms]}
   groups:  n name, b label, s size, r role, x exactness, w why, p parents, l least that stays,
            m members [weight, dim, offset, width, [[size, stride, group or -1]...]],
            c what a unit saves [params, macs, kv bytes], t walks [value, operator, value before]
   reasons: w why, a at; operators: [name, module, file:line]
   plan:    shapes after it, gone runs of indices, units that go of each group, merged groups, costs, loads */
const doc = JSON.parse(document.getElementById("document").textContent);
const { weights, groups = [], reasons = [], operators = [], plan = null } = doc;
const $ = id => document.getElementById(id);
const number = value => value.toLocaleString("en");
const hue = group => (group * 137.508 + 20) % 360;

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "on") for (const [event, handler] of Object.entries(value)) node.addEventListener(event, handler);
    else if (key === "style") for (const [name, each] of Object.entries(value)) node.style.setProperty(name, each);
    else if (value !== null && value !== false) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.filter(child => child !== null && child !== undefined));
  return node;
}

/* A name that may be broken after dots and underscores. */
const breakable = name => name.split(/(?<=[._])/).flatMap((part, at) => at ? [make("wbr"), part] : [part]);

const count = shape => shape.reduce((product, size) => product * size, 1);

const perTokens = doc.tokens ? `, ${doc.tokens} tokens` : "";

/* What is left of a group's units: "704", or "704 → 616" with a plan that takes some. */
const gone = group => plan?.units[group] ?? 0;
function units(group) {
  const { s: size } = groups[group], merged = plan?.merged[group];
  if (merged !== undefined) return `${number(size)} → ${number(merged)}`;
  return gone(group) ? `${number(size)} → ${number(size - gone(group))}` : number(size);
}

/* -- lighting up a group: one rule, whatever the number of strips -------------------------------- */

const light = document.head.appendChild(document.createElement("style"));
let pinned = null;
function lightUp(selector) {
  light.textContent = selector === null ? "" :
    `#model .seg:not(${selector}), #model .gone:not(${selector}), .graph .lit:not(${selector}) { opacity: .25 }
     .graph .edge:not(${selector}) { opacity: .07 } #model .seg${selector} { box-shadow: inset 0 0 0 2px var(--mark) }`;
}
const ofGroup = group => `[data-gs~="${group}"]`;
const ofReason = reason => `[data-f="${reason}"]`;
const selectorOf = at => at.dataset.g !== undefined ? ofGroup(at.dataset.g) : at.dataset.f !== undefined ? ofReason(at.dataset.f) : null;
for (const [enter, leave] of [["pointerover", "pointerout"], ["focusin", "focusout"]]) {
  $("model").addEventListener(enter, event => {
    const at = event.target.closest(".seg, .node");
    if (at && selectorOf(at)) lightUp(selectorOf(at));
  });
  $("model").addEventListener(leave, () => lightUp(pinned));
}
$("model").addEventListener("click", event => {
  const at = event.target.closest(".seg, .node");
  if (!at) return;
  if (at.dataset.g !== undefined) showGroup(+at.dataset.g);
  else if (at.dataset.f !== undefined) showReason(+at.dataset.f);
  else if (at.dataset.w !== undefined) showWeight(+at.dataset.w);
});

