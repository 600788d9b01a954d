// The text as a map: one element a token, coloured by what is known of it.

import { $, bestOf, element, explanation, number, printed, supportOf, warningList, warningsOf } from "./parts.js";
import { state } from "./state.js";
import { hideBelow } from "./words.js";

// Where the next colour begins: nats of KL as in the report, and support.
export const SCALES = {
  kl: {prefix: "k", steps: [0.03, 0.1, 0.3, 1, 3], unit: "nats of KL: more is worse"},
  support: {prefix: "s", steps: [0.25, 0.5, 0.7, 0.9], unit: "mean support of the words: more is better"},
};

const shades = ["k", "s"].flatMap((letter) => [0, 1, 2, 3, 4, 5].map((step) => letter + step));
let nodes = [], here = -1, tapped = -1, pointer = "mouse", hovered = false, togglePin = () => {};

// Tokens that are words without spaces of their own are set apart by spaces.
export const spaced = () =>
  state.tokens.length > 1 && !state.tokens.slice(1).some((token) => /^\s/.test(token));

export const valueOf = (row) => (state.colour === "kl" ? bestOf(row).kl : supportOf(row));

export function shadeOf(row) {
  const scale = SCALES[state.colour], value = valueOf(row);
  return value === null ? null : scale.steps.filter((step) => value >= step).length;
}

export const isSpecial = (token) => /^<.+>$/.test(token);

export function showText() {
  const apart = spaced();
  nodes = state.tokens.map((token, position) => {
    const shown = token.trim() === "" ? token : token.replaceAll("\\n", "⏎\n");
    const node = element("span", {id: `token-${position}`, class: "token", role: "option",
      "aria-selected": "false", "aria-label": `${printed(token)}, not explained`}, shown);
    if (isSpecial(token)) node.classList.add("special");
    node.dataset.position = position;
    return node;
  });
  $("tokens").replaceChildren(...nodes.flatMap((node, n) => (apart && n ? [" ", node] : [node])));
  here = tapped = -1;
  $("tokens").removeAttribute("aria-activedescendant");
  hideTip();
  state.rows.forEach((_, position) => showToken(position));
  showPinned();
}

export function showToken(position) {
  const node = nodes[position], row = state.rows.get(position);
  if (!node || !row) return;
  const reasons = warningsOf(row), shade = shadeOf(row);
  node.classList.remove(...shades);
  node.classList.add("known");
  if (shade !== null) node.classList.add(SCALES[state.colour].prefix + shade);
  node.classList.toggle("warned", reasons.length > 0);
  node.setAttribute("aria-label", [`${printed(state.tokens[position])}, ${position}`,
    bestOf(row).text.trim(), `KL ${number(bestOf(row).kl, 2)}`, ...reasons].join(". "));
  if (position === here && !$("tip").hidden) showTip(position);
}

export function showColours() {
  const {prefix, steps, unit} = SCALES[state.colour];
  const starts = [0, ...steps];
  $("legend").replaceChildren(...starts.map((start, step) => element("li", {},
    element("span", {class: `swatch ${prefix}${step}`}), `${start}+`)), element("li", {}, unit),
    element("li", {}, element("span", {class: "warned-key"}, "dotted"), ": a warning"));
  state.rows.forEach((_, position) => showToken(position));
}

export function showPinned() {
  const pinned = new Set(state.pins);
  nodes.forEach((node, position) => node.setAttribute("aria-selected", String(pinned.has(position))));
}

function moveTo(position) {
  nodes[here]?.classList.remove("here");
  here = position;
  const node = nodes[here];
  node.classList.add("here");
  $("tokens").setAttribute("aria-activedescendant", node.id);
  node.scrollIntoView({block: "nearest"});
  showTip(here);
}

function showTip(position) {
  const row = state.rows.get(position), tip = $("tip"), token = printed(state.tokens[position]);
  if (!row) {
    tip.replaceChildren(element("b", {}, token), element("span", {class: "facts-line"},
      position === 0 ? "not explained" : "not explained yet"));
  } else {
    const best = bestOf(row), first = ([token, share]) => `${printed(token)} ${share.toFixed(2)}`;
    tip.replaceChildren(element("b", {}, token), explanation(row, false),
      element("p", {class: "facts-line"}, `KL ${number(best.kl)} · cos ${number(best.cos)} · predicts ` +
        `${first(row.before[0])}, with the text ${first(best.after[0])}`),
      ...[warningList(row)].filter(Boolean));
    hideBelow(state.least);
  }
  tip.hidden = false;
  const box = nodes[position].getClientRects()[0], margin = 8;
  if (!box) return;
  const left = Math.min(Math.max(box.left, margin), document.documentElement.clientWidth - tip.offsetWidth - margin);
  const below = box.bottom + tip.offsetHeight + margin < innerHeight || box.top < tip.offsetHeight + margin;
  tip.style.left = `${left + scrollX}px`;
  tip.style.top = `${scrollY + (below ? box.bottom + 5 : box.top - tip.offsetHeight - 5)}px`;
}

const hideTip = () => { $("tip").hidden = true; };

// The token of the line above or below that is nearest in the other direction.
function inLine(direction) {
  const box = nodes[here].getClientRects()[0], middle = (box.left + box.right) / 2;
  let line = null, best = here, distance = Infinity;
  for (let n = here + direction; n >= 0 && n < nodes.length; n += direction) {
    const other = nodes[n].getClientRects()[0];
    if (!other || Math.abs(other.top - box.top) < box.height / 2) continue;
    line ??= other.top;
    if (Math.abs(other.top - line) > box.height / 2) break;
    const apart = Math.abs((other.left + other.right) / 2 - middle);
    if (apart < distance) [best, distance] = [n, apart];
  }
  return best;
}

const KEYS = {
  ArrowRight: () => Math.min(here + 1, nodes.length - 1),
  ArrowLeft: () => Math.max(here - 1, 0),
  ArrowDown: () => inLine(1),
  ArrowUp: () => inLine(-1),
  Home: () => 0,
  End: () => nodes.length - 1,
};

const first = () => (state.rows.size ? Math.min(...state.rows.keys()) : 0);

// One listener each for all tokens.
export function listen(pin) {
  togglePin = pin;
  const map = $("tokens");
  const target = (event) => {
    const node = event.target.closest?.(".token");
    return node ? Number(node.dataset.position) : -1;
  };
  map.addEventListener("pointerdown", (event) => { pointer = event.pointerType; });
  map.addEventListener("pointerover", (event) => {
    if (event.pointerType === "touch" || target(event) < 0) return;
    hovered = true;
    showTip(target(event));
  });
  map.addEventListener("pointerleave", () => {
    hovered = false;
    if (document.activeElement !== map || here < 0) hideTip();
    else showTip(here);
  });
  map.addEventListener("click", (event) => {
    const position = target(event);
    if (position < 0) return;
    const again = tapped === position;
    moveTo(position);
    tapped = position;
    if (pointer !== "touch" || again) togglePin(position);
  });
  map.addEventListener("keydown", (event) => {
    if (!nodes.length || event.ctrlKey || event.metaKey || event.altKey) return;
    const arrow = event.key.startsWith("Arrow");
    if (KEYS[event.key]) moveTo(here < 0 && arrow ? first() : KEYS[event.key]());
    else if ((event.key === "Enter" || event.key === " ") && here >= 0) togglePin(here);
    else if (event.key === "Escape") hideTip();
    else return;
    event.preventDefault();
  });
  map.addEventListener("focus", () => {
    if (nodes.length && !hovered && map.matches(":focus-visible")) moveTo(here < 0 ? first() : here);
  });
  map.addEventListener("blur", () => { if (!hovered) hideTip(); });
  map.addEventListener("scroll", hideTip);
  document.addEventListener("pointerdown", (event) => {
    if (!map.contains(event.target)) hideTip();
  });
}
