// Incremental parser of text/event-stream, as the HTML standard (9.2.6) defines it. Bytes may be
// cut anywhere: inside a character, between CR and LF, inside a field name.

export class EventStream {
  #decoder = new TextDecoder(); // keeps the head of a cut character, and strips one byte order mark
  #line = "";
  #data = [];
  #event = "";
  #afterReturn = false;

  /** The events completed by these bytes, each `{event, data}`. */
  push(bytes) {
    const events = [];
    let text = this.#decoder.decode(bytes, { stream: true });
    if (!text) return events;
    if (this.#afterReturn && text[0] === "\n") text = text.slice(1);
    this.#afterReturn = text ? text.endsWith("\r") : false;
    const lines = text.split(/\r\n|\r|\n/);
    const rest = lines.pop();
    for (const line of lines) {
      this.#take(this.#line + line, events);
      this.#line = "";
    }
    this.#line += rest;
    return events;
  }

  #take(line, events) {
    if (line === "") {
      if (this.#data.length) events.push({ event: this.#event || "message", data: this.#data.join("\n") });
      this.#data = [];
      this.#event = "";
      return;
    }
    const colon = line.indexOf(":");
    if (colon === 0) return; // a comment, which servers send to keep the connection open
    const field = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(line[colon + 1] === " " ? colon + 2 : colon + 1);
    if (field === "data") this.#data.push(value);
    else if (field === "event") this.#event = value;
  }
}
