// Words below a support, and all of rows that should not be believed, become a gap.
function hideBelow(least) {
  for (const word of document.querySelectorAll(".word")) {
    word.dataset.text ??= word.textContent;
    word.dataset.label ??= word.getAttribute("aria-label");
    const hidden = least > 0 && (word.dataset.value < least || word.closest(".warned") !== null);
    word.classList.toggle("gap", hidden);
    word.textContent = hidden ? "·" : word.dataset.text;
    word.setAttribute("aria-label", hidden ? "hidden" : word.dataset.label);
  }
}
