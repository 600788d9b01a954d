// What the explorer does; the server sends it as it is.
import { hideBelow } from "./words.js";

const $ = (id) => document.getElementById(id);
// The content of a saved file: the text, its tokens, and one row per explained token.
let state = {schema: 1, text: "", tokens: [], rows: {}, edited: {}, position: null};
let asked = 0;  // number of the newest request; answers to older ones are not shown
let editing = {shown: "", reading: null};  // the edit field's content before any edit

async function ask(path, body) {
  const options = body && {method: "POST", body: JSON.stringify(body),
    headers: {"Content-Type": "application/json"}};
  const answer = await fetch(path, options);
  if (!answer.ok) {
    const problem = await answer.json().catch(() => ({}));
    throw new Error(problem.error || `the server answered ${answer.status}`);
  }
  return answer;
}

async function attempt(work) {
  $("message").textContent = "";
  try { await work(); } catch (error) {
    $("message").textContent = error.message;
    $("explanation").classList.remove("writing");
  }
}

const number = (value) => value.toFixed(3);

function showPredictions(list, predictions) {
  list.replaceChildren(...predictions.map(([token, probability]) => {
    const row = document.createElement("li");
    const name = document.createElement("span"), bar = document.createElement("i");
    const share = document.createElement("span");
    name.textContent = token;
    bar.style.width = `${100 * probability}%`;
    share.textContent = probability.toFixed(2);
    row.append(name, bar, share);
    return row;
  }));
}

// The words of a greedy text, those with a number as elements that show it; else the text.
function showExplanation(row) {
  const reading = row && row.readings[0], words = row && row.words;
  $("hide-below").hidden = !words;
  $("no-support").hidden = !words || !$("no-support").textContent;
  $("explanation").classList.toggle("warned", !!row && warningsOf(row, reading).length > 0);
  if (!words) {
    if (reading) $("explanation").textContent = reading.text;
    return;
  }
  $("explanation").replaceChildren(...words.flatMap((word) => {
    if (word.value === null) return [word.space + word.text];
    const shown = document.createElement("span");
    shown.className = `word ${word.level}`;
    shown.textContent = word.text;
    shown.tabIndex = 0;
    shown.title = word.note;
    shown.setAttribute("role", "note");
    shown.setAttribute("aria-label", `${word.text}, ${word.note}`);
    Object.assign(shown.dataset, {value: word.value, note: word.note});
    return [word.space, shown];
  }));
  hideBelow(Number($("least").value));
}

// Why a reading should not be believed; none in states of earlier versions.
const warningsOf = (row, reading) => [...row.warnings || [], ...reading.warnings || []];

function showWarnings(list, row) {
  const reasons = row ? warningsOf(row, row.readings[0]) : [];
  list.replaceChildren(...reasons.map((reason) => {
    const item = document.createElement("li"), mark = document.createElement("b");
    mark.textContent = "! ";
    item.append(mark, reason);
    return item;
  }));
}

function showTokens() {
  $("hint").hidden = !state.tokens.length;
  $("save").disabled = !state.tokens.length;
  $("tokens").replaceChildren(...state.tokens.map((token, position) => {
    const button = document.createElement("button");
    button.textContent = token;
    button.setAttribute("aria-pressed", position === state.position);
    const row = state.rows[position];
    if (row) {
      const strength = 0.5 * Math.min(Math.max(row.readings[0].kl, 0) / 2, 1);
      button.style.background = `rgba(var(--warm),${strength})`;
      const reasons = warningsOf(row, row.readings[0]);
      button.title = [row.readings[0].text, ...reasons.map((reason) => `! ${reason}`)].join("\n");
      button.classList.toggle("warned", reasons.length > 0);
    }
    button.onclick = () => attempt(() => explain(position));
    return button;
  }));
}

function showResult() {
  const row = state.rows[state.position], edited = state.edited[state.position];
  $("result").hidden = state.position === null;
  if (state.position === null) return;
  $("chosen").textContent = `“${state.tokens[state.position]}” (${state.position})`;
  const reading = row && row.readings[0];
  showExplanation(row);
  showWarnings($("warnings"), row);
  showWarnings($("edited-warnings"), edited);
  $("kl").textContent = reading ? number(reading.kl) : "";
  $("cos").textContent = reading ? number(reading.cos) : "";
  showPredictions($("before"), row ? row.before : []);
  showPredictions($("after"), reading ? reading.after : []);
  const change = edited && edited.readings[0];
  $("reads-back").hidden = !reading || reading.reads_back !== false;
  $("edit").value = (change || reading || {text: ""}).text;
  editing = {shown: $("edit").value, reading: change || reading};  // the field changes line endings
  $("swap").disabled = !row;
  $("edited-kl").textContent = change ? number(change.kl) : "";
  $("edited-cos").textContent = change ? number(change.cos) : "";
  $("edited-tokens").textContent = !change || !change.tokens ? "" :
    `read as ${change.tokens.length} tokens` +
    (change.reads_back === false ? ", those that were written; the text alone gives others" : "");
  showPredictions($("edited"), change ? change.after : []);
}

async function read() {
  const text = $("text").value, question = ++asked;
  const {tokens} = await (await ask("/api/tokens", {text})).json();
  if (question !== asked) return;
  state = {schema: 1, text, tokens, rows: {}, edited: {}, position: null};
  showTokens();
  showResult();
}

async function explain(position) {
  const question = ++asked;
  state.position = position;
  delete state.rows[position];
  delete state.edited[position];
  showTokens();
  showResult();
  $("explanation").textContent = "";
  $("explanation").classList.add("writing");
  const answer = await ask("/api/explain", {text: state.text, position,
    decoding: $("decoding").value, seed: Number($("seed").value) || 0});
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const {value, done} = await reader.read();
    if (question !== asked) { reader.cancel(); return; }
    if (done) break;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const {text, row, words, error} = JSON.parse(line);
      if (error) throw new Error(error);
      if (text !== undefined) $("explanation").textContent = text;
      if (row) state.rows[position] = {...row, words};
    }
  }
  $("explanation").classList.remove("writing");
  if (!state.rows[position]) throw new Error("the answer ended early; try again");
  showTokens();
  showResult();
}

async function swap() {
  const position = state.position, question = ++asked;
  const body = {text: state.text, position, explanation: $("edit").value};
  // Not edited: send the tokens that were written, since the text may give others.
  if (editing.reading && editing.reading.tokens && body.explanation === editing.shown) {
    body.explanation = editing.reading.text;
    body.tokens = editing.reading.tokens;
  }
  const {row} = await (await ask("/api/swap", body)).json();
  if (question !== asked) return;
  state.edited[position] = row;
  showResult();
}

function save() {
  const blob = new Blob([JSON.stringify(state, null, 1)], {type: "application/json"});
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = "lens-state.json";
  link.click();
  URL.revokeObjectURL(link.href);
}

async function open(file) {
  let saved;
  try { saved = JSON.parse(await file.text()); } catch { saved = null; }
  const complete = saved && Array.isArray(saved.tokens) && saved.rows && saved.edited;
  if (!complete || saved.schema !== 1) throw new Error(`${file.name} is not a saved state of this page`);
  ++asked;
  state = saved;
  $("text").value = state.text;
  showTokens();
  showResult();
}

$("least").oninput = () => {
  $("least-shown").textContent = Number($("least").value).toFixed(2);
  hideBelow(Number($("least").value));
};
$("read").onclick = () => attempt(read);
$("swap").onclick = () => attempt(swap);
$("save").onclick = save;
$("open").onclick = () => $("file").click();
$("file").onchange = () => attempt(async () => {
  if ($("file").files.length) await open($("file").files[0]);
  $("file").value = "";
});
attempt(async () => {
  const facts = await (await ask("/api/lens")).json();
  $("facts").textContent = `${facts.model}, output of block ${facts.layer}, ` +
    `${facts.text_len} tokens per explanation, texts of up to ${facts.max_tokens} tokens` +
    (facts.first_position ? `; trained on tokens from ${facts.first_position} on` : "");
  $("no-support").textContent = facts.no_support || "";
  $("kind").textContent = facts.no_support ? "the decoder's own probability" : "support";
});
