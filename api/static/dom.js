// Small helpers for the document. Text goes in as text, never as markup: the page's policy forbids the rest.

export const byId = (id) => document.getElementById(id);

/** A new element; `properties` are set on it (class names as `className`), children are nodes or strings. */
export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

export function show(element, visible) {
  element.hidden = !visible;
}

/** Copy to the clipboard, also on plain http, where browsers offer only the old way. True when it worked. */
export async function copy(text) {
  if (navigator.clipboard) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {
      // not allowed: try the old way
    }
  }
  const field = make("textarea", { value: text, className: "unseen", readOnly: true });
  const home = document.querySelector("dialog[open]") ?? document.body; // a modal makes the rest inert
  const focused = document.activeElement;
  home.append(field);
  field.select();
  const copied = document.execCommand("copy");
  field.remove();
  focused?.focus();
  return copied;
}

/** Let a click beside a dialog close it; Esc does so by itself. */
export function closeOutside(dialog) {
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
}

/** Say on a button that it worked, for a moment. */
export function flash(button, word) {
  const before = button.dataset.word ?? button.textContent;
  button.dataset.word = before;
  button.textContent = word;
  clearTimeout(Number(button.dataset.timer));
  button.dataset.timer = String(setTimeout(() => { button.textContent = before; }, 1600));
}
