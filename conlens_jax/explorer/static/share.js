// The state in a file or an address, and the map as a picture, a table or lines of Python.

import { SCALES, shadeOf, spaced } from "./heat.js";
import { $, printed } from "./parts.js";
import { file } from "./server.js";
import { asked, state, toFile, toHash } from "./state.js";

export function download(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

const say = (text) => { $("shared").textContent = text; };

async function copy(text, what) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // without permission, or not on this machine
    const field = document.createElement("textarea");
    field.value = text;
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
  }
  say(`${what} copied.`);
}

// Lines that give the same numbers. A JSON string is a Python string too.
export function python(lens) {
  const text = state.messages ? JSON.stringify(state.messages) : JSON.stringify(state.text);
  const settings = state.decoding === "greedy" ? "" : `, decoding="sample", seed=${state.seed}`;
  return [
    "import conlens_jax", "",
    `lens = conlens_jax.Lens.load(${JSON.stringify(lens.name ?? "runs/quickstart")})`,
    `text = ${text}`,
    `explanations = lens.explain(text${settings})`,
    "for row in explanations:",
    "    print(row.position, row.token, row.explanation, row.best.kl)",
    ...state.pins.map((position) => `pinned = lens.explain(text, ${position}${settings})[0]`), "",
  ].join("\n");
}

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 900, LINE = 30, SIZE = 16, MARGIN = 24;

// The map as a picture of its own: light, in the colours of the page, with its legend.
export function picture() {
  const pen = document.createElement("canvas").getContext("2d");
  const font = `${SIZE}px system-ui, sans-serif`, shapes = [];
  pen.font = font;
  const {prefix, steps, unit} = SCALES[state.colour];
  const colour = prefix === "k" ? "#d55e00" : "#0072b2";
  const shares = prefix === "k" ? [0, .12, .24, .38, .54, .72] : [0, .12, .24, .38, .56];
  let x = MARGIN, y = MARGIN;
  const space = spaced() ? 5 : 0;
  state.tokens.forEach((token, position) => {
    const row = state.rows.get(position), shown = printed(token), width = pen.measureText(shown).width;
    if (x + width > WIDTH - MARGIN && x > MARGIN) [x, y] = [MARGIN, y + LINE];
    const shade = row && shadeOf(row);
    if (shade) shapes.push(["rect", {x, y: y - 2, width, height: SIZE + 8, rx: 3, fill: colour, "fill-opacity": shares[shade]}]);
    shapes.push(["text", {x, y: y + SIZE, fill: row ? "#1b1f24" : "#59616b"}, shown]);
    x += width + space;
    if (/\\n/.test(token)) [x, y] = [MARGIN, y + LINE];
  });
  [x, y] = [MARGIN, y + 1.6 * LINE];
  [0, ...steps].forEach((start, step) => {
    shapes.push(["rect", {x, y: y + 4, width: 12, height: 12, fill: colour, "fill-opacity": shares[step], stroke: "#59616b"}]);
    shapes.push(["text", {x: x + 17, y: y + SIZE - 1, fill: "#59616b", "font-size": 13}, `${start}+`]);
    x += 62;
  });
  shapes.push(["text", {x, y: y + SIZE - 1, fill: "#59616b", "font-size": 13}, unit]);
  const made = document.createElementNS(SVG, "svg"), height = y + LINE + MARGIN;
  const set = (node, fields) => Object.entries(fields).forEach(([name, value]) => node.setAttribute(name, value));
  set(made, {width: WIDTH, height, viewBox: `0 0 ${WIDTH} ${height}`, "font-family": "system-ui, sans-serif", "font-size": SIZE});
  for (const [tag, fields, text] of [["rect", {width: WIDTH, height, fill: "#fff"}], ...shapes]) {
    const node = document.createElementNS(SVG, tag);
    set(node, fields);
    if (text !== undefined) {
      node.textContent = text;
      node.setAttribute("xml:space", "preserve");
    }
    made.append(node);
  }
  return {text: new XMLSerializer().serializeToString(made), height};
}

async function png() {
  const {text, height} = picture(), image = new Image(), sharp = 2;
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(text)}`;
  await image.decode();
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [WIDTH * sharp, height * sharp];
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  return new Promise((resolve, reject) => canvas.toBlob((blob) =>
    (blob ? resolve(blob) : reject(new Error("the text is too long for a PNG; take the SVG"))), "image/png"));
}

async function fileOf(kind) {
  if (kind === "svg") return new Blob([picture().text], {type: "image/svg+xml"});
  if (kind === "png") return png();
  return file("/api/export", {...asked(), format: kind});
}

// `attempt` shows what goes wrong; `reopen` shows the state of a file.
export function listen(lensOf, attempt, reopen) {
  $("copy-link").onclick = () => attempt(async () => {
    history.replaceState(null, "", await toHash());
    await copy(location.href, "The address of this text, its pins and settings");
  });
  $("copy-python").onclick = () => attempt(() => copy(python(lensOf()), "The lines"));
  $("save").onclick = () => download(new Blob([toFile()], {type: "application/json"}), "lens-state.json");
  $("open").onclick = () => $("file").click();
  $("file").onchange = () => attempt(async () => {
    const [chosen] = $("file").files;
    if (chosen) reopen(await chosen.text(), chosen.name);
    $("file").value = "";
  });
  for (const button of document.querySelectorAll("[data-file]")) {
    const kind = button.dataset.file;
    button.onclick = () => attempt(async () => {
      say("");
      download(await fileOf(kind), `lens.${kind}`);
      say(`lens.${kind} is saved.`);
    });
  }
}
