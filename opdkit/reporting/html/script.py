"""The lines of script of the pages: they show values, move a focus, and hide what was not searched for.

A page is whole without them: everything can be read and opened, and a token's note is shown by the style sheet. They
write text only (`textContent`), never markup, so no word of a run can become an element by them.
"""

from __future__ import annotations

# One stop of the tab key for each curve, each answer's tokens (arrow keys move among them) and its list of sentences.
PAGE = """
"use strict";
const all = (what, within = document) => [...within.querySelectorAll(what)];
const make = (name) => Object.assign(document.createElement("div"), {className: name});

const at = make("at"), said = make("said"), read = new WeakMap();
let shown = null, where = 0;
function curvesOf(curve) {
  if (!read.has(curve)) {
    const lines = all("[data-x]", curve).map(({dataset: {x, y, n}}) =>
      ({x: x.split(" ").map(Number), y: y.split(";"), name: n}));
    read.set(curve, {lines, steps: [...new Set(lines.flatMap((line) => line.x))].sort((a, b) => a - b)});
  }
  return read.get(curve);
}
function nearest(values, wanted) {
  let best = 0;
  values.forEach((value, i) => { if (Math.abs(value - wanted) < Math.abs(values[best] - wanted)) best = i; });
  return best;
}
function show(curve, index) {
  const {lines, steps} = curvesOf(curve), step = steps[index], along = curve.dataset.along;
  const words = lines.map((line) => {
    const i = nearest(line.x, step), other = line.x[i] === step ? "" : ` (${along} ${line.x[i].toLocaleString("en")})`;
    return `${line.name ? line.name + ": " : ""}${line.y[i]}${other}`;
  });
  said.textContent = [`${along} ${step.toLocaleString("en")}`, ...words].join(lines.length > 1 ? "\\n" : ": ");
  const first = steps[0], span = steps[steps.length - 1] - first || 1;
  const left = curve.children[0].getBoundingClientRect().width, width = curve.clientWidth - left;
  const x = steps.length > 1 ? (step - first) / span : 0.5;
  at.style.left = `${left + width * x}px`;
  curve.append(at, said);
  said.style.left = `${Math.max(0, Math.min(left + width * x - said.offsetWidth / 2,
                                            curve.clientWidth - said.offsetWidth))}px`;
  curve.setAttribute("aria-valuetext", said.textContent);
  [shown, where] = [curve, index];
}
function hide() { at.remove(); said.remove(); shown = null; }
function point(event) {
  const curve = event.target.closest?.(".curve");
  if (!curve) return shown && !shown.matches(":focus") ? hide() : undefined;
  const {steps} = curvesOf(curve), box = curve.children[1].getBoundingClientRect();
  const wanted = steps[0] + (event.clientX - box.left) / box.width * (steps[steps.length - 1] - steps[0]);
  show(curve, nearest(steps, wanted));
}
document.addEventListener("pointermove", point);
document.addEventListener("pointerdown", point);

function reach(list, from, by) {
  const next = list[Math.max(0, Math.min(list.length - 1, list.indexOf(from) + by))];
  for (let each = next?.parentElement; each; each = each.parentElement)
    if (each.tagName === "DETAILS" && !(next.tagName === "SUMMARY" && next.parentElement === each)) each.open = true;
  next?.focus();
}
const STRONG = /[udn][456]/;
function keyOfToken(key, token) {
  const tokens = all("i", token.closest(".heat")), strong = (list) => list.find((each) => STRONG.test(each.className));
  const here = tokens.indexOf(token), row = token.closest(".heat details")?.querySelector("summary");
  if (key === "ArrowRight" || key === "ArrowLeft") reach(tokens, token, key === "ArrowRight" ? 1 : -1);
  else if (key === "PageDown") reach([strong(tokens.slice(here + 1)) ?? token], null, 1);
  else if (key === "PageUp") reach([strong(tokens.slice(0, here).reverse()) ?? token], null, 1);
  else if (key === "Home" || key === "End") reach(tokens, token, key === "End" ? Infinity : -Infinity);
  else if (key === "Escape" && row) row.focus();
  else return false;
  return true;
}
function keyOfCurve(key, curve) {
  const last = curvesOf(curve).steps.length - 1, by = {ArrowLeft: -1, ArrowRight: 1, PageDown: -10, PageUp: 10}[key];
  if (by) show(curve, Math.max(0, Math.min(last, where + by)));
  else if (key === "Home" || key === "End") show(curve, key === "End" ? last : 0);
  else if (key === "Escape") hide();
  else return false;
  return true;
}
function keyOfSentence(key, row) {
  const rows = all("summary", row.closest(".heat"));
  if (key === "ArrowDown" || key === "ArrowUp") reach(rows, row, key === "ArrowDown" ? 1 : -1);
  else if (key === "Home" || key === "End") reach(rows, row, key === "End" ? Infinity : -Infinity);
  else if (key === "ArrowRight") reach(all("i", row.parentElement), null, 1);
  else return false;
  return true;
}
document.addEventListener("keydown", (event) => {
  if (event.altKey || event.ctrlKey || event.metaKey) return;
  const {target, key} = event;
  const done = target.matches(".heat i") ? keyOfToken(key, target) : target.matches(".curve") ? keyOfCurve(key, target)
    : target.matches(".heat summary") && keyOfSentence(key, target);
  if (done) event.preventDefault();
});
function stop(elements, only) { elements.forEach((each) => { each.tabIndex = each === only ? 0 : -1; }); }
document.addEventListener("focusin", ({target}) => {
  if (target.matches(".curve") && shown !== target) show(target, curvesOf(target).steps.length - 1);
  if (target.matches(".heat i")) {
    stop(all("i[tabindex='0']", target.closest(".heat details, .heat")), target);
    target.setAttribute("aria-label", target.dataset.t);
  }
  if (target.matches(".heat summary")) stop(all("summary", target.closest(".heat")), target);
});
document.addEventListener("focusout", ({target}) => { if (target === shown) hide(); });

function reveal() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  for (let each = target; each; each = each.parentElement) if (each.tagName === "DETAILS") each.open = true;
  target?.scrollIntoView({block: "nearest", inline: "nearest"});
}
addEventListener("hashchange", reveal);

const texts = new WeakMap();
function textOf(element) {
  if (!texts.has(element)) texts.set(element, element.textContent.toLowerCase());
  return texts.get(element);
}
function find() {
  const bar = document.querySelector(".controls");
  if (!bar) return;
  const words = bar.querySelector("input").value.trim().toLowerCase(), groups = all(".group");
  const [wanted, order] = [all("select[name=only]", bar).map((each) => each.value), bar.querySelector("[name=order]")];
  let found = 0, count = 0;
  for (const group of groups) {
    const answers = all("article", group), asked = words && textOf(group.querySelector(".asked")).includes(words);
    const hits = answers.filter((each) => wanted.every((kind) => !kind || each.dataset.f.split(" ").includes(kind))
                                          && (!words || asked || textOf(each).includes(words)));
    answers.forEach((each) => { each.hidden = !hits.includes(each); });
    group.hidden = !hits.length;
    found += hits.length;
    count += answers.length;
  }
  const [name, sign] = {low: ["r", 1], high: ["r", -1], loss: ["loss", -1], page: ["i", 1]}[order.value];
  groups.sort((a, b) => sign * (a.dataset[name] - b.dataset[name])).forEach((each) => each.parentElement.append(each));
  bar.querySelector("output").textContent = `${found.toLocaleString("en")} of ${count.toLocaleString("en")} answers`;
}
let later = 0;
document.addEventListener("input", ({target}) => {
  if (target.closest(".controls")) { clearTimeout(later); later = setTimeout(find, 120); }
});
function begin() {
  all(".heat i:not([tabindex])").forEach((each) => { each.tabIndex = -1; });
  all(".controls").forEach((each) => { each.hidden = false; });
  all(".scroll, .side").forEach((each) => { each.tabIndex = each.scrollWidth > each.clientWidth ? 0 : -1; });
  all(".heat").forEach((heat) => stop(all("summary", heat), heat.querySelector("summary")));
  find();
}
begin();
if (location.hash) reveal();
"""

# A page that is served looks every few seconds whether its files have changed, and takes the new page's content in the
# place of its own: what was open, searched for and focused stays so.
LIVE = """
const EVERY = 3000;
const note = Object.assign(document.createElement("p"), {className: "ended", role: "status", hidden: true});
document.body.append(note);
const nameOf = (each) => each.id || `${each.closest("section, article")?.id} ${each.firstElementChild?.textContent}`;
function replace(text) {
  const fresh = new DOMParser().parseFromString(text, "text/html").querySelector("main");
  const old = document.querySelector("main");
  if (!fresh || !old) return;
  const open = new Map(all("details", old).map((each) => [nameOf(each), each.open]));
  all("details", fresh).forEach((each) => { each.open = open.get(nameOf(each)) ?? each.open; });
  const fields = all("input, select", old), focused = fields.indexOf(document.activeElement);
  hide();
  old.replaceWith(fresh);
  all("input, select", fresh).forEach((each) => {
    const was = fields.find((other) => other.name === each.name && other.ariaLabel === each.ariaLabel);
    if (was) [each.value, each.checked] = [was.type === "checkbox" ? each.value : was.value, was.checked];
  });
  begin();
  if (focused >= 0) all("input, select", fresh)[focused]?.focus({preventScroll: true});
}
async function look() {
  const address = location.href.split("#")[0], main = document.querySelector("main");
  try {
    const now = await fetch(address, {method: "HEAD"});
    if (now.ok && now.headers.get("ETag") !== `"${main.dataset.mark}"`) replace(await (await fetch(address)).text());
    note.hidden = now.ok;
    note.textContent = now.ok ? "" : "This page is no longer there.";
  } catch {
    note.hidden = false;
    note.textContent = "The server has ended: this page no longer follows the run.";
  }
  setTimeout(look, document.hidden ? 5 * EVERY : EVERY);
}
setTimeout(look, EVERY);
"""
