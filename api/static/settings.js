// What the person at the page chose, kept in this browser; empty fields are the server's to choose.

import { byId, closeOutside } from "./dom.js";

const STORE = "octet.settings";
const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];

export class Settings {
  #values = load();

  /** Fields of a request. */
  get fields() {
    return { ...this.#values };
  }

  get thinks() {
    return this.#values.enable_thinking;
  }

  /** `undefined` leaves the choice to the server. */
  set(name, value) {
    if (value === undefined) delete this.#values[name];
    else this.#values[name] = value;
    try {
      localStorage.setItem(STORE, JSON.stringify(this.#values));
    } catch {
      // a browser that keeps nothing: they last as long as the page
    }
  }

  /** Connect the dialog and the Think button; both show the same thing. */
  connect() {
    const dialog = byId("settings"), think = byId("think"), checkbox = byId("enable_thinking");
    const draw = () => {
      for (const name of NUMBERS) byId(name).value = this.#values[name] ?? "";
      checkbox.checked = this.thinks;
      think.setAttribute("aria-pressed", String(this.thinks));
    };
    const setThinking = (on) => {
      this.set("enable_thinking", on);
      draw();
    };
    for (const name of NUMBERS) byId(name).addEventListener("change", () => this.#read(byId(name)));
    checkbox.addEventListener("change", () => setThinking(checkbox.checked));
    think.addEventListener("click", () => setThinking(!this.thinks));
    byId("open-settings").addEventListener("click", () => {
      draw();
      dialog.showModal();
    });
    byId("reset-settings").addEventListener("click", () => {
      for (const name of NUMBERS) this.set(name, undefined);
      setThinking(false);
    });
    closeOutside(dialog);
    draw();
  }

  /** Keep what a field says if it is in range; the browser shows what is wrong with it otherwise. */
  #read(input) {
    if (!input.checkValidity()) {
      input.reportValidity();
      return;
    }
    this.set(input.name, input.value === "" ? undefined : Number(input.value));
  }
}

function load() {
  const values = { enable_thinking: false };
  try {
    const stored = JSON.parse(localStorage.getItem(STORE)) ?? {};
    for (const name of NUMBERS) if (Number.isFinite(stored[name])) values[name] = stored[name];
    values.enable_thinking = stored.enable_thinking === true;
  } catch {
    // nothing stored, or not by us
  }
  return values;
}
