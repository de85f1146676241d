// Pictures and clips on their way into a question: picked, dropped, pasted, shown as thumbnails, removed.

import { byId, make, show } from "./dom.js";
import { Failure } from "./server.js";

// The body holds them as base64, a third larger; the server takes 256 MiB unless told otherwise.
export const MAX_BYTES = 180 * 1024 * 1024;

/** One picture or clip. `url` shows it here, `data` (a data: URL) is what the server gets. */
class Attachment {
  constructor(file, name) {
    this.file = file;
    this.name = name;
    this.kind = file.type.startsWith("video/") ? "video" : "image";
    this.size = file.size;
    this.url = URL.createObjectURL(file);
    this.data = ""; // once it is `ready`
    this.ready = this.#read();
  }

  async #read() {
    this.data = await new Promise((done, failed) => {
      const reader = new FileReader();
      reader.onload = () => done(reader.result);
      reader.onerror = () => failed(new Failure(`${this.name} could not be read. Attach it again.`));
      reader.readAsDataURL(this.file);
    });
  }

  /** What shows it in the page. What this browser cannot show becomes a tile with its name. */
  picture() {
    const shown = this.kind === "image"
      ? make("img", { src: this.url, alt: this.name })
      : make("video", { src: this.url, playsInline: true, preload: "metadata" });
    shown.addEventListener("error", () => {
      (shown.closest(".clip") ?? shown).replaceWith(make("span", { className: "tile" }, this.name));
    });
    return shown;
  }

  /** The same; a clip plays and pauses by a click. */
  player() {
    const shown = this.picture();
    if (this.kind === "image") return shown;
    const button = make("button", { type: "button", className: "clip" }, shown);
    const draw = () => {
      button.classList.toggle("playing", !shown.paused);
      button.setAttribute("aria-label", `${shown.paused ? "Play" : "Pause"} ${this.name}`);
    };
    for (const event of ["play", "pause", "ended"]) shown.addEventListener(event, draw);
    button.addEventListener("click", () => (shown.paused ? shown.play() : shown.pause()));
    draw();
    return button;
  }
}

/** The row of attachments in the composer. */
export class Tray {
  #attachments = [];
  #names = new Map(); // how often a name was used in this conversation
  #list = byId("tray");
  #notice = byId("notice");

  get isEmpty() {
    return this.#attachments.length === 0;
  }

  /** Add what can be asked about; say which files cannot. */
  add(files) {
    const problems = [];
    for (const file of files) {
      const problem = this.#problem(file);
      if (problem) problems.push(problem);
      else this.#append(file);
    }
    this.say(problems.join(" "));
  }

  /** Hand over all attachments, in order, and be empty. */
  take() {
    const taken = this.#attachments;
    this.#attachments = [];
    this.#list.replaceChildren();
    show(this.#list, false);
    this.say("");
    return taken;
  }

  #problem(file) {
    if (!/^(image|video)\//.test(file.type)) return `${file.name} is neither a picture nor a clip.`;
    if (file.size === 0) return `${file.name} is empty.`;
    const used = this.#attachments.reduce((sum, attachment) => sum + attachment.size, 0);
    if (used + file.size > MAX_BYTES) {
      return `${file.name} (${megabytes(file.size)}) is too large: a question may carry ${megabytes(MAX_BYTES)}.`;
    }
    return "";
  }

  /** Show a sentence above the text, or none. */
  say(text) {
    this.#notice.textContent = text;
    show(this.#notice, text !== "");
  }

  #append(file) {
    const attachment = new Attachment(file, this.#uniqueName(file));
    this.#attachments.push(attachment);
    const item = this.#item(attachment);
    this.#list.append(item);
    show(this.#list, true);
    attachment.ready.catch((error) => {
      this.#remove(attachment, item);
      this.say(error.message);
    });
  }

  #item(attachment) {
    const remove = make("button", { type: "button", className: "remove", title: "Remove" }, "×");
    remove.setAttribute("aria-label", `Remove ${attachment.name}`);
    const item = make("li", { className: attachment.kind, title: attachment.name }, attachment.picture(), remove);
    remove.addEventListener("click", () => {
      const next = (item.nextElementSibling ?? item.previousElementSibling)?.querySelector("button");
      this.#remove(attachment, item);
      (next ?? byId("message")).focus();
    });
    return item;
  }

  #remove(attachment, item) {
    this.#attachments = this.#attachments.filter((other) => other !== attachment);
    URL.revokeObjectURL(attachment.url);
    item.remove();
    show(this.#list, !this.isEmpty);
    this.say("");
  }

  /** Pasted pictures are all called image.png; files of one name would be one in code that reads them. */
  #uniqueName(file) {
    const name = file.name || `pasted.${file.type.split("/")[1]}`;
    const used = this.#names.get(name) ?? 0;
    this.#names.set(name, used + 1);
    return used ? name.replace(/(\.[^.]*)?$/, (ending) => `-${used + 1}${ending}`) : name;
  }
}

/** Let files come in by every way a browser has: the dialog, drops anywhere, the clipboard. */
export function acceptFiles(tray, changed) {
  const add = (files) => {
    if (!files.length) return;
    tray.add([...files]);
    changed();
  };
  const input = byId("files");
  byId("attach").addEventListener("click", () => input.click());
  input.addEventListener("change", () => {
    add(input.files);
    input.value = "";
  });
  document.addEventListener("paste", (event) => {
    const files = event.clipboardData?.files ?? [];
    if (!files.length) return;
    event.preventDefault();
    add(files);
  });
  acceptDrops(add);
}

function acceptDrops(add) {
  const zone = byId("dropzone");
  const hasFiles = (event) => event.dataTransfer?.types.includes("Files") && !document.querySelector("dialog[open]");
  let depth = 0; // of nested elements the pointer entered
  const settle = (change) => {
    depth = Math.max(0, depth + change);
    show(zone, depth > 0);
  };
  document.addEventListener("dragenter", (event) => hasFiles(event) && settle(1));
  document.addEventListener("dragleave", (event) => hasFiles(event) && settle(-1));
  document.addEventListener("dragover", (event) => hasFiles(event) && event.preventDefault());
  document.addEventListener("drop", (event) => {
    settle(-depth);
    if (!hasFiles(event)) return;
    event.preventDefault();
    add(event.dataTransfer.files);
  });
}

function megabytes(bytes) {
  const size = bytes / 1024 / 1024;
  return `${size < 10 ? size.toFixed(1) : Math.round(size)} MB`;
}
