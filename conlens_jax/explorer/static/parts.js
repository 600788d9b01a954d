// Small pieces of the page: elements, words, predictions, warnings.

export const $ = (id) => document.getElementById(id);

// Text is always set as text, never as markup.
export function element(tag, fields = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(fields)) {
    if (name === "class") made.className = value;
    else if (name === "data") Object.assign(made.dataset, value);
    else if (name in made && !name.startsWith("aria")) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

export const number = (value, digits = 3) =>
  value === null || value === undefined ? "—" : value.toFixed(digits);

// A token with its line breaks as such, and something to see where there is only white space.
export function printed(token) {
  if (token.trim() === "") return token.replaceAll(" ", "␣") || "∅";
  return token.replaceAll("\\n", "⏎");
}

// The reading that changes the model's prediction least.
export const bestOf = (row) => row.readings.reduce((a, b) => (b.kl < a.kl ? b : a));

export const warningsOf = (row) => [...row.warnings, ...bestOf(row).warnings];

// The words of a greedy text, those with a number as elements that show it; else the text.
export function explanation(row, focusable) {
  const shown = element("p", {class: "explanation", dir: "auto"});
  if (warningsOf(row).length) shown.classList.add("warned");
  if (!row.words) {
    shown.textContent = bestOf(row).text;
    return shown;
  }
  for (const word of row.words) {
    if (word.value === null) {
      shown.append(word.space + word.text);
      continue;
    }
    const part = element("span", {class: `word ${word.level}`.trim(), title: word.note,
      data: {value: word.value, note: word.note}}, word.text);
    if (focusable) {
      part.tabIndex = 0;
      part.setAttribute("role", "note");
      part.setAttribute("aria-label", `${word.text}, ${word.note}`);
    }
    shown.append(word.space, part);
  }
  return shown;
}

export function warningList(row) {
  const reasons = warningsOf(row);
  if (!reasons.length) return null;
  return element("ul", {class: "warnings"},
    ...reasons.map((reason) => element("li", {}, element("b", {}, "! "), reason)));
}

// Bars of the likeliest next tokens; those that another list does not have are marked.
export function predictions(pairs, others) {
  const known = others && new Set(others.map(([token]) => token));
  return element("ol", {class: "predictions"}, ...pairs.map(([token, probability]) => {
    const bar = element("i");
    bar.style.width = `${Math.max(100 * probability, 0.5)}%`;
    const row = element("li", {}, element("div", {}, element("code", {}, printed(token)),
      element("span", {}, probability.toFixed(2))), bar);
    if (known && !known.has(token)) row.classList.add("changed");
    return row;
  }));
}

export function titled(title, ...children) {
  return element("div", {class: "part"}, element("h5", {}, title), ...children);
}

// The mean of what is known of the words: support or the decoder's own probability.
export function supportOf(row) {
  const values = (row.words || []).map((word) => word.value).filter((value) => value !== null);
  return values.length ? values.reduce((a, b) => a + b) / values.length : null;
}

// A button whose work is shown while it lasts; what it returns is put into the place.
export function button(label, place, work) {
  const made = element("button", {type: "button", class: "small"}, label);
  made.onclick = async () => {
    made.disabled = true;
    place.replaceChildren(element("p", {class: "busy", role: "status"}, "working …"));
    try {
      place.replaceChildren(...[await work()].flat());
    } catch (error) {
      place.replaceChildren(element("p", {class: "busy", role: "alert"}, error.message));
    }
    made.disabled = false;
  };
  return made;
}
