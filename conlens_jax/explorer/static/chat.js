// A conversation instead of a text: messages with their roles.

import { $, element } from "./parts.js";

const ROLES = ["system", "user", "assistant"];

function message({role, content}) {
  const roles = ROLES.includes(role) ? ROLES : [...ROLES, role];
  const select = element("select", {"aria-label": "Role"}, ...roles.map((name) => element("option", {}, name)));
  select.value = role;
  const field = element("textarea", {rows: 2, "aria-label": "Message", value: content});
  const remove = element("button", {type: "button", class: "small", "aria-label": "Remove this message"}, "×");
  const item = element("li", {}, select, field, remove);
  remove.onclick = () => item.remove();
  return item;
}

export function showMessages(messages) {
  $("is-chat").checked = messages !== null;
  $("chat").hidden = messages === null;
  $("text").hidden = messages !== null;
  $("messages").replaceChildren(...(messages ?? []).map(message));
}

// The messages as they are in the fields; null without a chat.
export function readMessages() {
  if (!$("is-chat").checked) return null;
  return [...$("messages").children].map((item) => ({
    role: item.querySelector("select").value, content: item.querySelector("textarea").value}));
}

export function listen(start) {
  $("is-chat").onchange = () => showMessages($("is-chat").checked ? start() : null);
  $("add-message").onclick = () => {
    const last = $("messages").lastElementChild?.querySelector("select").value;
    $("messages").append(message({role: last === "user" ? "assistant" : "user", content: ""}));
  };
}
