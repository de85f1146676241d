// Server-sent events out of bytes that arrive in any pieces: a piece may end within a line or a character.

export class EventParser {
  #decoder = new TextDecoder(); // keeps the bytes of a character that is not complete yet
  #line = "";
  #data = [];
  #afterReturn = false; // the last character was \r: a \n behind it belongs to the same line end

  /** The data of every event that these bytes (Uint8Array) complete. */
  push(bytes) {
    return this.#take(this.#decoder.decode(bytes, { stream: true }));
  }

  #take(text) {
    const events = [];
    let start = 0;
    for (let i = 0; i < text.length; i++) {
      const character = text[i];
      const endsLine = character === "\n" || character === "\r";
      if (endsLine && !(character === "\n" && this.#afterReturn)) {
        this.#endLine(this.#line + text.slice(start, i), events);
        this.#line = "";
      }
      if (endsLine) start = i + 1;
      this.#afterReturn = character === "\r";
    }
    this.#line += text.slice(start);
    return events;
  }

  #endLine(line, events) {
    if (line === "") {
      if (this.#data.length) events.push(this.#data.join("\n"));
      this.#data = [];
    } else if (line === "data" || line.startsWith("data:")) {
      this.#data.push(line.slice(5).replace(/^ /, ""));
    } // comments and other fields mean nothing here
  }
}
