// What the page shows, as one object; it fits into a file, and without its results into an address.

export const SCHEMA = 2;

export const state = {
  text: "",
  messages: null, // of a chat, else null
  lens: 0,
  decoding: "greedy",
  seed: 0,
  colour: "kl",
  least: 0,
  pins: [], // positions, in the order of pinning
  tokens: [],
  rows: new Map(), // position → explained token
};

// What the server needs to know of the text.
export const asked = () => ({
  ...(state.messages ? {messages: state.messages} : {text: state.text}),
  lens: state.lens, decoding: state.decoding, seed: state.seed,
});
export const place = (position) => {
  const {decoding, seed, ...document} = asked();
  return {...document, position};
};

const KEPT = ["text", "messages", "lens", "decoding", "seed", "colour", "least", "pins"];
const settings = () => Object.fromEntries(KEPT.map((name) => [name, state[name]]));

// Values of another page or an old address: only those of the right kind are taken.
export function adopt(values) {
  const whole = (value) => Number.isSafeInteger(value) && value >= 0;
  const role = (message) => typeof message?.role === "string" && typeof message?.content === "string";
  if (typeof values.text === "string") state.text = values.text;
  state.messages = Array.isArray(values.messages) && values.messages.length &&
    values.messages.every(role) ? values.messages.map(({role, content}) => ({role, content})) : null;
  if (whole(values.lens)) state.lens = values.lens;
  if (["greedy", "sample"].includes(values.decoding)) state.decoding = values.decoding;
  if (Number.isSafeInteger(values.seed)) state.seed = values.seed;
  if (["kl", "support"].includes(values.colour)) state.colour = values.colour;
  if (Number.isFinite(values.least) && values.least >= 0 && values.least <= 1) state.least = values.least;
  state.pins = Array.isArray(values.pins) ? [...new Set(values.pins.filter(whole))].slice(0, 50) : [];
}

async function through(stream, bytes) {
  const piped = new Blob([bytes]).stream().pipeThrough(stream);
  return new Uint8Array(await new Response(piped).arrayBuffer());
}

export async function toHash() {
  const packed = await through(new CompressionStream("deflate-raw"),
    new TextEncoder().encode(JSON.stringify(settings())));
  const letters = Array.from(packed, (byte) => String.fromCharCode(byte)).join("");
  return "#s=" + btoa(letters).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}

// Whether there was a state in the address.
export async function fromHash(hash) {
  if (!hash.startsWith("#s=")) return false;
  try {
    const letters = atob(hash.slice(3).replaceAll("-", "+").replaceAll("_", "/"));
    const bytes = Uint8Array.from(letters, (letter) => letter.charCodeAt(0));
    const packed = await through(new DecompressionStream("deflate-raw"), bytes);
    adopt(JSON.parse(new TextDecoder().decode(packed)));
    return true;
  } catch {
    throw new Error("the address has no state that can be read; it may have been cut");
  }
}

export const toFile = () => JSON.stringify(
  {schema: SCHEMA, ...settings(), tokens: state.tokens, rows: Object.fromEntries(state.rows)}, null, 1);

const isRow = (row) => row && Array.isArray(row.before) && Array.isArray(row.readings) &&
  row.readings.length > 0 && row.readings.every((reading) => typeof reading.text === "string" &&
    Number.isFinite(reading.kl) && Number.isFinite(reading.cos) && Array.isArray(reading.after));

// Also of version 1, which had no settings and one row per clicked token.
export function fromFile(content, name) {
  let saved = null;
  try { saved = JSON.parse(content); } catch { /* said below */ }
  const rows = Object.entries(saved?.rows ?? {});
  if (![1, SCHEMA].includes(saved?.schema) || !Array.isArray(saved.tokens) ||
      !rows.every(([position, row]) => saved.tokens[position] !== undefined && isRow(row))) {
    throw new Error(`${name} is not a saved state of this page`);
  }
  adopt(saved);
  state.tokens = saved.tokens.map(String);
  state.rows = new Map(rows.map(([position, row]) => [Number(position), completed(row)]));
}

const completed = (row) => ({
  warnings: [], words: null, norm: null, kl_mean: null, ...row,
  readings: row.readings.map((reading) => ({warnings: [], ...reading})),
});
