// The API key, where the server asks for one: kept for this tab alone, sent with every request.

import { byId } from "./dom.js";

const STORE = "octet.key";

export class Key {
  #value = load();

  get value() {
    return this.#value;
  }

  /** Ask for a key; true when one was given. */
  ask() {
    const dialog = byId("key-dialog"), input = byId("key");
    byId("key-hint").textContent = this.#value
      ? "The server does not know this key. Check it for typing errors."
      : "Its operator has one for you. It is kept until you close this tab.";
    input.value = "";
    if (!dialog.open) dialog.showModal();
    return new Promise((resolve) => {
      byId("cancel-key").onclick = () => dialog.close();
      dialog.onclose = () => {
        const given = dialog.returnValue === "given";
        dialog.returnValue = "";
        if (given) this.#keep(input.value.trim());
        input.value = "";
        resolve(given);
      };
    });
  }

  #keep(value) {
    this.#value = value;
    try {
      sessionStorage.setItem(STORE, value);
    } catch {
      // it lasts as long as the page
    }
  }
}

function load() {
  try {
    return sessionStorage.getItem(STORE) ?? "";
  } catch {
    return "";
  }
}
