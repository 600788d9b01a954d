// Editing an explanation: replace, drop or type words, and see what the model predicts then.

import { isSpecial, spaced } from "./heat.js";
import { bestOf, button, element, number, predictions, titled } from "./parts.js";
import { ask } from "./server.js";
import { place, state } from "./state.js";

// The part of a card that edits the explanation of a token.
export function editor(position) {
  const row = state.rows.get(position), written = bestOf(row);
  if (!written.tokens) return element("p", {class: "note"}, "The tokens of this text are not known.");
  const shown = written.pieces ?? written.tokens.map(() => null);
  const pieces = written.tokens.map((token, n) => ({token, text: shown[n] ?? "", was: token}));
  let edited = pieces.filter((piece) => piece.text !== ""); // the end token is not shown
  const ends = written.tokens.slice(edited.length);
  let typed = null; // a text that was typed instead

  const list = element("div", {class: "pieces"}), choices = element("div", {class: "choices", hidden: true});
  const field = element("textarea", {rows: 2, "aria-label": "The explanation as text"});
  const result = element("div"), continued = element("div");

  const tokens = () => [...edited.map((piece) => piece.token), ...ends];
  const change = () => (typed === null ? {tokens: tokens()} : {explanation: typed});
  const request = () => ({...place(position), written: written.tokens, ...change()});
  const textOf = () => edited.map((piece) => piece.text).join("").trim();

  function show() {
    choices.hidden = true;
    list.hidden = typed !== null || !written.pieces;
    list.replaceChildren(...edited.map((piece, n) => {
      const made = element("button", {type: "button", class: "piece"}, piece.text.trim() || "␣");
      made.classList.toggle("changed", piece.token !== piece.was);
      made.title = "Replace or drop";
      made.onclick = () => choose(n);
      return made;
    }));
    if (typed === null) field.value = written.pieces ? textOf() : written.text;
  }

  async function choose(n) {
    choices.hidden = false;
    choices.replaceChildren(element("p", {class: "busy", role: "status"}, "working …"));
    try {
      const found = await ask("/api/alternatives", {...place(position), tokens: tokens(), count: 10});
      const drop = element("button", {type: "button", class: "piece"}, "drop it");
      drop.onclick = () => { edited.splice(n, 1); show(); };
      drop.disabled = edited.length === 1;
      const others = (found.places[n] || []).filter(([token]) => token !== edited[n].token);
      choices.replaceChildren(element("p", {class: "note"}, "By the decoder's own probability here:"),
        element("div", {class: "pieces"}, ...others.map(([token, text, probability]) => {
          const made = element("button", {type: "button", class: "piece"}, text.trim() || "␣",
            element("span", {}, probability.toFixed(2)));
          made.onclick = () => { edited[n] = {...edited[n], token, text}; show(); };
          return made;
        }), drop));
    } catch (error) {
      choices.replaceChildren(element("p", {class: "busy", role: "alert"}, error.message));
    }
  }

  async function predict() {
    const {row: changed, control, moved} = await ask("/api/edit", request());
    const after = bestOf(changed), other = bestOf(control);
    return [element("p", {class: "facts-line"}, `edited: KL ${number(after.kl)}, cos ${number(after.cos)}; ` +
      `moved by ${number(moved, 1)}; control: KL ${number(other.kl)}`),
      element("div", {class: "pair"},
        titled("the explanation", predictions(written.after)),
        titled("edited", predictions(after.after, written.after)),
        titled("control: a random change of the same size", predictions(other.after, written.after)))];
  }

  const strength = element("input", {type: "range", min: -4, max: 8, step: 0.5, value: 2, "aria-label": "Strength"});
  const strengthShown = element("output", {}, "2.0");
  strength.oninput = () => { strengthShown.textContent = Number(strength.value).toFixed(1); };
  async function goOn() {
    const found = await ask("/api/steer", {...request(), strength: Number(strength.value), new_tokens: 16});
    const space = spaced() ? " " : "";
    const before = state.tokens.slice(Math.max(0, position - 5), position + 1).filter((t) => !isSpecial(t));
    const line = (name, text) => titled(name, element("p", {class: "continued"},
      element("b", {}, before.join(space).trimStart()), space + text));
    return [line("the model", found.before), line("moved by the edit", found.after),
      line("control: as far in a random direction", found.after_control)];
  }

  field.oninput = () => { typed = field.value; list.hidden = choices.hidden = true; };
  const undo = element("button", {type: "button", class: "small"}, "Undo all");
  undo.onclick = () => {
    edited = pieces.filter((piece) => piece.text !== "");
    typed = null;
    show();
    result.replaceChildren();
    continued.replaceChildren();
  };
  show();
  return element("div", {class: "edit"}, element("h4", {}, "Edit the explanation"), list, choices, field,
    element("div", {class: "row"}, button("Predict", result, predict), undo), result,
    element("h4", {}, "Continue from here with the activation moved by the edit"),
    element("div", {class: "row"}, element("label", {}, "strength ", strength), strengthShown,
      button("Continue", continued, goOn)), continued);
}
