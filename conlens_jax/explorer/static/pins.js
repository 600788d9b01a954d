// Pinned tokens side by side: what is known of each, and what can be asked.

import { editor } from "./edit.js";
import { $, bestOf, button, element, explanation, number, predictions, printed, titled, warningList } from "./parts.js";
import { ask } from "./server.js";
import { asked, place, state } from "./state.js";
import { hideBelow } from "./words.js";

const cards = new Map(); // position → element, so that what was asked stays when others are pinned
let lenses = [], changed = () => {};

export function setUp(served, whenChanged) {
  [lenses, changed] = [served, whenChanged];
}

export function forgetCards() {
  cards.clear();
}

export function togglePin(position) {
  if (state.pins.includes(position)) state.pins = state.pins.filter((other) => other !== position);
  else if (state.rows.has(position)) state.pins.push(position);
  else return;
  showPins();
  changed();
}

export function showPins() {
  const known = state.pins.filter((position) => state.rows.has(position));
  for (const position of [...cards.keys()]) if (!known.includes(position)) cards.delete(position);
  for (const position of known) if (!cards.has(position)) cards.set(position, card(position));
  $("pinned").hidden = !known.length;
  $("pins").replaceChildren(...known.map((position) => cards.get(position)));
  showDifference(known);
  hideBelow(state.least);
}

const nameOf = (position) => `“${printed(state.tokens[position]).trim()}” (${position})`;

function card(position) {
  const row = state.rows.get(position), best = bestOf(row), name = nameOf(position);
  const close = element("button", {type: "button", class: "small", "aria-label": `Unpin ${name}`}, "Unpin");
  close.onclick = () => togglePin(position);
  const claims = element("div"), layers = element("div"), editing = element("div");
  const facts = [["position", position], ["KL", number(best.kl)],
    ["KL of the mean", number(row.kl_mean)], ["cos", number(best.cos)], ["norm", number(row.norm, 1)]];
  const actions = element("div", {class: "row actions"},
    button("Edit", editing, async () => editor(position)));
  if (!lenses[state.lens].no_support) {
    actions.append(button("Claims of 16 samples", claims, () => claimTable(position)));
  }
  if (lenses.length > 1) actions.append(button("Other layers", layers, () => otherLayers(position)));
  return element("article", {class: "box pin", "aria-label": `Pinned token ${name}`},
    element("header", {}, element("h3", {}, name), close),
    explanation(row, true), warningList(row),
    best.reads_back === false ? element("p", {class: "note"}, "Tokenised again, this text gives " +
      "other tokens; the numbers are those of the tokens that were written.") : null,
    element("dl", {class: "chips"}, ...facts.map(([term, value]) =>
      element("div", {}, element("dt", {}, term), element("dd", {}, String(value))))),
    element("h4", {}, "Next token"),
    element("div", {class: "pair"}, titled("the model", predictions(row.before)),
      titled("with the text in its place", predictions(best.after, row.before))),
    actions, claims, layers, editing);
}

async function claimTable(position) {
  const {claims, samples} = await ask("/api/claims", {...place(position), seed: state.seed});
  const head = ["claim", "kind", "share", "support", "lift"];
  const cells = (claim) => [claim.text, claim.kind, `${Math.round(claim.share * samples)}/${samples}`,
    // Rounded down: a support below 1 is never shown as 1.
    claim.support === null ? "—" : number(Math.floor(100 * claim.support + 1e-6) / 100, 2),
    claim.lift === null ? "—" : `${number(claim.lift, claim.lift < 10 ? 1 : 0)}×`];
  if (!claims.length) return element("p", {class: "note"}, "The samples state nothing together.");
  return [element("h4", {}, `What ${samples} samples agree on`),
    element("div", {class: "scroll"}, element("table", {class: "claims"},
      element("thead", {}, element("tr", {}, ...head.map((name) => element("th", {}, name)))),
      element("tbody", {}, ...claims.map((claim) =>
        element("tr", {}, ...cells(claim).map((cell) => element("td", {}, cell)))))))];
}

async function otherLayers(position) {
  const {lens, ...request} = {...asked(), position};
  const {rows} = await ask("/api/layers", request);
  const found = rows.map(({lens, layer, row}) => titled(
    `block ${layer}${lenses[lens].name ? `, ${lenses[lens].name}` : ""}`, explanation(row, true),
    element("p", {class: "facts-line"}, `KL ${number(bestOf(row).kl)} · cos ${number(bestOf(row).cos)}`)));
  return [element("h4", {}, "At every layer"), ...found];
}

// Of exactly two pins: the words that only one has, and the difference as the decoder reads it.
function showDifference(pins) {
  const shown = $("difference");
  shown.hidden = pins.length !== 2;
  if (pins.length !== 2) return;
  const [a, b] = pins, words = pins.map(wordsOf), asks = element("div");
  const only = (own, other) => [...own].filter((word) => !other.has(word)).join(", ") || "none";
  const both = [...words[0]].filter((word) => words[1].has(word)).join(", ") || "none";
  const compare = button("Explain the difference", asks, async () => {
    const {decoding, seed, ...document} = asked();
    const found = await ask("/api/compare", {...document, positions: [a, b]});
    return [
      titled(`${nameOf(a)} minus ${nameOf(b)}`, element("p", {class: "explanation"}, found.towards_a)),
      titled(`${nameOf(b)} minus ${nameOf(a)}`, element("p", {class: "explanation"}, found.towards_b)),
      element("p", {class: "facts-line"}, `The two explanations carry the difference with cosine ` +
        `${number(found.cos, 2)}; the first text above with ${number(found.cos_towards_a, 2)}.`)];
  });
  shown.replaceChildren(element("h3", {}, "What differs"), element("div", {class: "pair"},
    titled(`only ${nameOf(a)}`, element("p", {}, only(words[0], words[1]))),
    titled("both", element("p", {}, both)),
    titled(`only ${nameOf(b)}`, element("p", {}, only(words[1], words[0])))), compare, asks);
}

const wordsOf = (position) => {
  const row = state.rows.get(position);
  const texts = row.words ? row.words.map((word) => word.text) : bestOf(row).text.split(/\s+/);
  return new Set(texts.map((text) => text.trim()).filter((text) => /[\p{L}\p{N}]/u.test(text)));
};
