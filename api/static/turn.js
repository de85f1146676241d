// One question and its answer on the page: what is shown while it comes in, and when it has ended.

import { byId, copy, flash, make, show } from "./dom.js";
import { Prose } from "./prose.js";

export class Turn {
  content = ""; // the answer so far, without the reasoning
  body = null; // the request it is the answer to
  isFinished = false;
  #reasoning = "";
  #usage = null;
  #firstUsage = null; // as of the first token, so that the rate leaves out the prompt
  #times = { asked: 0, first: 0, last: 0, thought: 0 }; // milliseconds
  #parts;
  #prose;
  #frame = 0;

  /** `question` is {text, media}; `actions` are {retry(turn), showCode(turn)}. */
  constructor(number, question, actions) {
    this.question = question;
    const root = byId("turn-template").content.cloneNode(true);
    const find = (selector) => root.querySelector(selector);
    this.element = find(".turn");
    this.#parts = {
      answer: find(".answer"), thinking: find(".thinking"), label: find(".label"), thoughts: find(".thoughts"),
      waiting: find(".waiting"), prose: find(".prose"), failure: find(".failure"), sentence: find(".sentence"),
      below: find(".below"), numbers: find(".numbers"), copyAnswer: find(".copy-answer"),
      asCode: find(".as-code"),
    };
    this.#prose = new Prose(this.#parts.prose);
    find("h3").textContent = `Question ${number}`;
    find(".words").textContent = question.text;
    show(find(".words"), question.text !== "");
    find(".media").append(...question.media.map((attachment) => attachment.player()));
    find(".retry").addEventListener("click", () => actions.retry(this));
    find(".as-code").addEventListener("click", () => actions.showCode(this));
    this.#parts.copyAnswer.addEventListener("click", async (event) => {
      flash(event.currentTarget, (await copy(this.content)) ? "Copied" : "Not allowed");
    });
  }

  /** Whether it belongs to the conversation that later questions build on. */
  get counts() {
    return this.isFinished && this.content !== "";
  }

  /** Forget an earlier try, and show that an answer is on its way. */
  wait() {
    const parts = this.#parts;
    this.content = this.#reasoning = "";
    this.isFinished = false;
    this.#usage = this.#firstUsage = null;
    this.#times = { asked: 0, first: 0, last: 0, thought: 0 };
    parts.thoughts.textContent = "";
    parts.thinking.open = false;
    parts.answer.setAttribute("aria-busy", "true");
    for (const part of [parts.thinking, parts.failure, parts.below]) show(part, false);
    show(parts.waiting, true);
    this.#drawSoon();
  }

  /** The request is on its way: the time until the first token starts here. */
  begin(body) {
    this.body = body;
    this.#times.asked = performance.now();
  }

  /** One chunk of the stream. */
  add({ reasoning, content, usage }) {
    const now = performance.now(), times = this.#times;
    if (usage) this.#usage = usage;
    if (!reasoning && !content) return;
    times.last = now;
    if (!times.first) {
      times.first = now;
      this.#firstUsage = usage;
    }
    if (content && !this.content) times.thought = now;
    this.#reasoning += reasoning;
    this.content += content;
    this.#drawSoon();
  }

  finish(reason) {
    this.isFinished = true;
    this.#end();
    const isCut = reason === "length";
    if (this.content && isCut) this.#addNumber("cut at the longest answer allowed");
    if (this.content) return;
    if (this.#reasoning) this.#addNumber(isCut ? "cut while thinking" : "ended while thinking");
    else this.#addNumber("an empty answer");
  }

  /** The person at the page stopped it; what has come in so far stays. */
  stop() {
    this.isFinished = true;
    this.#end();
    this.#addNumber("stopped");
  }

  fail(sentence) {
    this.#end();
    this.#parts.sentence.textContent = sentence;
    show(this.#parts.failure, true);
  }

  /** Give back the memory of what the question showed. */
  close() {
    cancelAnimationFrame(this.#frame);
    for (const attachment of this.question.media) URL.revokeObjectURL(attachment.url);
    this.element.remove();
  }

  #end() {
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    this.#parts.answer.setAttribute("aria-busy", "false");
    this.#draw();
    show(this.#parts.waiting, false);
    this.#drawNumbers();
  }

  #drawSoon() {
    this.#frame ||= requestAnimationFrame(() => {
      this.#frame = 0;
      this.#draw();
    });
  }

  #draw() {
    const parts = this.#parts;
    if (this.#reasoning) this.#drawThinking();
    show(parts.waiting, !this.#reasoning && !this.content && !this.isFinished);
    this.#prose.draw(this.content.trimStart());
  }

  #drawThinking() {
    const parts = this.#parts, times = this.#times;
    const isRunning = parts.answer.getAttribute("aria-busy") === "true" && !this.content;
    show(parts.thinking, true);
    parts.thinking.classList.toggle("running", isRunning);
    const spent = ((times.thought || times.last) - times.first) / 1000;
    parts.label.textContent = isRunning ? "Thinking" : `Thought for ${seconds(spent)}`;
    parts.thoughts.textContent = this.#reasoning.trim();
  }

  #drawNumbers() {
    this.#parts.numbers.replaceChildren();
    if (this.#times.first) this.#addNumber(`first token ${seconds((this.#times.first - this.#times.asked) / 1000)}`);
    const rate = this.#rate();
    if (rate) this.#addNumber(`${rate} tokens/s`);
    if (this.#usage) for (const part of countsOf(this.#usage)) this.#addNumber(part);
    show(this.#parts.copyAnswer, this.content !== "");
    show(this.#parts.asCode, this.body !== null);
    show(this.#parts.below, true);
  }

  #addNumber(text) {
    this.#parts.numbers.append(make("span", {}, text));
  }

  /** Tokens per second behind the first, "" when there were too few to tell or all came together. */
  #rate() {
    const tokens = (this.#usage?.completion_tokens ?? 0) - (this.#firstUsage?.completion_tokens ?? 0);
    const time = (this.#times.last - this.#times.first) / 1000;
    if (tokens < 1 || time < 0.02) return "";
    return tokens / time < 10 ? (tokens / time).toFixed(1) : String(Math.round(tokens / time));
  }
}

function countsOf(usage) {
  const details = usage.prompt_tokens_details ?? {};
  const within = [
    [details.image_tokens, "image"], [details.video_tokens, "video"], [details.cached_tokens, "cached"],
  ].filter(([count]) => count).map(([count, name]) => `${count} ${name}`);
  const prompt = `${usage.prompt_tokens} prompt tokens` + (within.length ? ` (${within.join(", ")})` : "");
  const thought = usage.completion_tokens_details?.reasoning_tokens;
  return [prompt, `${usage.completion_tokens} answer tokens` + (thought ? ` (${thought} thinking)` : "")];
}

function seconds(value) {
  return value < 10 ? `${value.toFixed(value < 1 ? 2 : 1)} s` : `${Math.round(value)} s`;
}
