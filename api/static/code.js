// The dialog that shows a request as code, to run it outside of this page.

import { byId, closeOutside, copy, flash } from "./dom.js";
import { asCurl, asPython, filesOf } from "./request.js";

const LANGUAGES = { "code-curl": asCurl, "code-python": asPython };
let shown = null;

export function connectCode() {
  closeOutside(byId("code-dialog"));
  for (const id of Object.keys(LANGUAGES)) byId(id).addEventListener("click", () => draw(id));
  byId("close-code").addEventListener("click", () => byId("code-dialog").close());
  byId("copy-code").addEventListener("click", async (event) => {
    flash(event.currentTarget, (await copy(byId("code").textContent)) ? "Copied" : "Select it by hand");
  });
}

/** `media` are all attachments of the conversation; the code reads them from files. */
export function showCode(body, media, hasKey) {
  shown = { body, media, hasKey };
  draw("code-curl");
  byId("code-dialog").showModal();
}

function draw(id) {
  const { body, media, hasKey } = shown;
  const address = location.href.replace(/[?#].*$/, "").replace(/\/[^/]*$/, "");
  for (const other of Object.keys(LANGUAGES)) byId(other).setAttribute("aria-pressed", String(other === id));
  byId("code").textContent = LANGUAGES[id](body, media, address, hasKey);
  const files = filesOf(body, media);
  byId("code-note").textContent = [
    files.length && `The media is left out here: run it where ${list(files)} ${files.length > 1 ? "are" : "is"}.`,
    hasKey && "Put your key into OCTET_API_KEY.",
    id === "code-python" && "It needs the openai package.",
  ].filter(Boolean).join(" ");
}

function list(names) {
  return names.length > 1 ? `${names.slice(0, -1).join(", ")} and ${names.at(-1)}` : names[0];
}
