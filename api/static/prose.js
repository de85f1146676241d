// A model's text as paragraphs, code blocks, `code` and **bold**; nothing else of Markdown. While text
// streams in, only the blocks that changed are drawn again.

import { make } from "./dom.js";

const FENCE = /^ {0,3}```/;
const INLINE = /`([^`\n]+)`|\*\*([^*\n]+)\*\*/g;

/** Text to blocks: {kind: "code" | "text", text, language}. An open fence at the end is code, too. */
export function blocksOf(text) {
  const blocks = [];
  let block = null;
  const end = () => {
    if (block && (block.kind === "code" || block.lines.length)) {
      blocks.push({ kind: block.kind, text: block.lines.join("\n"), language: block.language });
    }
    block = null;
  };
  for (const line of text.split("\n")) {
    const isFence = FENCE.test(line);
    if (isFence && block?.kind === "code") {
      end();
    } else if (isFence) {
      end();
      block = { kind: "code", lines: [], language: line.trim().slice(3).trim() };
    } else if (block?.kind === "code") {
      block.lines.push(line);
    } else if (line.trim() === "") {
      end();
    } else {
      block ??= { kind: "text", lines: [], language: "" };
      block.lines.push(line);
    }
  }
  end();
  return blocks;
}

/** Draws a growing text into one element. */
export class Prose {
  #element;
  #drawn = [];

  constructor(element) {
    this.#element = element;
  }

  draw(text) {
    const blocks = blocksOf(text);
    blocks.forEach((block, index) => {
      const before = this.#drawn[index];
      if (before && before.kind === block.kind && before.text === block.text) return;
      const node = nodeOf(block);
      if (before) this.#element.children[index].replaceWith(node);
      else this.#element.append(node);
    });
    while (this.#element.children.length > blocks.length) this.#element.lastElementChild.remove();
    this.#drawn = blocks;
  }
}

function nodeOf(block) {
  if (block.kind === "text") return make("p", {}, ...inline(block.text));
  const code = make("pre", { tabIndex: 0 }, make("code", {}, block.text));
  code.setAttribute("aria-label", block.language ? `${block.language} code` : "code");
  return code;
}

function inline(text) {
  const nodes = [];
  let done = 0;
  for (const match of text.matchAll(INLINE)) {
    nodes.push(text.slice(done, match.index));
    nodes.push(match[1] === undefined ? make("strong", {}, match[2]) : make("code", {}, match[1]));
    done = match.index + match[0].length;
  }
  nodes.push(text.slice(done));
  return nodes;
}
