// The page: what is asked of the server, and where the answers are shown.

import * as chat from "./chat.js";
import * as heat from "./heat.js";
import { $, element } from "./parts.js";
import * as pins from "./pins.js";
import { ask, lines } from "./server.js";
import * as share from "./share.js";
import { adopt, asked, fromFile, fromHash, state, toHash } from "./state.js";
import { hideBelow } from "./words.js";

let facts = {lenses: [{}]};
let stop = null; // of the text that is being explained
let shownHash = "";

async function attempt(work) {
  $("message").textContent = "";
  try {
    await work();
  } catch (error) {
    if (error.name !== "AbortError") $("message").textContent = error.message;
  }
}

async function keepAddress() {
  shownHash = await toHash();
  history.replaceState(null, "", shownHash);
}

function showSettings() {
  $("text").value = state.text;
  $("decoding").value = state.decoding;
  $("seed").value = state.seed;
  $("lens").value = state.lens;
  $("least").value = state.least;
  $("least-shown").textContent = state.least.toFixed(2);
  document.querySelector(`[name=colour][value=${state.colour}]`).checked = true;
  chat.showMessages(state.messages);
  showFacts();
}

function showFacts() {
  const lens = facts.lenses[state.lens] ?? facts.lenses[0], name = lens.no_support ? "probability" : "support";
  $("facts").textContent = `${lens.model}, output of block ${lens.layer}, ${lens.text_len} tokens per ` +
    `explanation, texts of up to ${lens.max_tokens} tokens` +
    (lens.first_position ? `; trained on tokens from ${lens.first_position} on` : "");
  $("no-support").textContent = lens.no_support ?? "";
  $("kind").textContent = $("support-name").textContent = name;
  heat.SCALES.support.unit = `mean ${name} of the words: more is better`;
}

function showAll() {
  pins.forgetCards();
  heat.showColours();
  heat.showText();
  pins.showPins();
}

// --- a whole text -------------------------------------------------------------------------------

const clock = (seconds) => (seconds < 90 ? `${Math.ceil(seconds)} s` : `${Math.ceil(seconds / 60)} min`);

function showProgress(news, total, pace) {
  $("bar").max = total || 1;
  $("bar").value = news.done;
  const left = pace.seconds && news.done > pace.from
    ? `, about ${clock((total - news.done) * pace.seconds / (news.done - pace.from))} left` : "";
  const words = {
    waiting: "waiting for another request",
    compiling: `compiling, once (${clock(news.seconds)})`,
    explaining: `${news.done} of ${total} tokens${left}`,
  };
  $("progress-text").textContent = words[news.state] ?? "";
}

async function explain() {
  stop?.abort();
  const own = stop = new AbortController();
  const messages = chat.readMessages();
  Object.assign(state, {
    text: $("text").value, messages, decoding: $("decoding").value,
    seed: Math.trunc(Number($("seed").value)) || 0, lens: Number($("lens").value) || 0,
  });
  showFacts();
  $("progress").hidden = $("cancel").hidden = false;
  $("progress-text").textContent = "…";
  $("bar").removeAttribute("value");
  let total = 0, last = {state: "stopped", done: 0};
  const pace = {from: 0, since: 0, seconds: 0}; // without the first batch, which may have compiled
  try {
    for await (const news of lines("/api/text", asked(), own.signal)) {
      if (own !== stop) return;
      if (news.tokens) {
        const same = JSON.stringify(news.tokens) === JSON.stringify(state.tokens);
        total = news.total;
        Object.assign(state, {tokens: news.tokens, rows: new Map()});
        if (!same) state.pins = state.pins.filter((position) => position < news.tokens.length);
        showAll();
        keepAddress();
        continue;
      }
      last = news;
      for (const row of news.rows ?? []) {
        state.rows.set(row.position, row);
        heat.showToken(row.position);
      }
      if (news.rows) {
        if (!pace.since) Object.assign(pace, {since: performance.now(), from: news.done});
        pins.showPins();
      }
      pace.seconds = pace.since ? (performance.now() - pace.since) / 1000 : 0;
      showProgress(news, total, pace);
      if (news.error) throw new Error(news.error);
    }
    if (last.state !== "done") throw new Error("the answer ended early; press Explain to go on");
  } finally {
    if (own === stop) {
      stop = null;
      $("progress").hidden = $("cancel").hidden = true;
    }
  }
}

function cancel() {
  stop?.abort();
  $("message").textContent = "Stopped. Explain goes on from here.";
}

// --- start --------------------------------------------------------------------------------------

$("form").onsubmit = (event) => {
  event.preventDefault();
  state.pins = $("text").value === state.text ? state.pins : [];
  attempt(explain);
};
$("cancel").onclick = cancel;
$("text").onkeydown = (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
};
$("lens").onchange = () => attempt(explain);
$("colour-by").onchange = (event) => {
  state.colour = event.target.value;
  heat.showColours();
  keepAddress();
};
$("least").oninput = () => {
  state.least = Number($("least").value);
  $("least-shown").textContent = state.least.toFixed(2);
  hideBelow(state.least);
};
$("least").onchange = keepAddress;
heat.listen(pins.togglePin);
chat.listen(() => [{role: "user", content: $("text").value || "Hello!"}]);
share.listen(() => facts.lenses[state.lens], attempt, (content, name) => {
  stop?.abort();
  fromFile(content, name);
  showSettings();
  showAll();
  keepAddress();
});

// While the lens is being loaded: what it said of its example when it was last here.
async function waitForLens() {
  let shown = false;
  for (;;) {
    facts = await ask("/api/lens");
    if (!facts.loading) break;
    $("facts").textContent = "The lens is being loaded …";
    $("explain").disabled = true;
    if (!shown && facts.kept && !location.hash.startsWith("#s=")) {
      state.tokens = facts.kept.tokens;
      state.rows = new Map(facts.kept.rows.map((row) => [row.position, row]));
      $("text").value = state.text = facts.kept.text;
      heat.showColours();
      heat.showText();
      shown = true;
    }
    await new Promise((resolve) => setTimeout(resolve, 500));
  }
  $("explain").disabled = false;
}

async function start() {
  await waitForLens();
  pins.setUp(facts.lenses, () => {
    heat.showPinned();
    keepAddress();
  });
  $("lens-field").hidden = facts.lenses.length < 2;
  $("lens").replaceChildren(...facts.lenses.map((lens, number) =>
    element("option", {value: number}, `block ${lens.layer}`)));
  $("chat-field").hidden = !facts.chat;
  adopt({text: facts.example});
  const problem = await fromHash(location.hash).then(() => "", (error) => error.message);
  if (state.lens >= facts.lenses.length) state.lens = 0;
  showSettings();
  heat.showColours();
  if (state.text || state.messages) await explain();
  if (problem) throw new Error(problem);
}

attempt(start);
window.addEventListener("hashchange", () => attempt(async () => {
  if (location.hash === shownHash || !(await fromHash(location.hash))) return;
  showSettings();
  await explain();
}));
