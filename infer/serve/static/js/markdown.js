/**
 * From Markdown to elements. What a model writes is not trusted: markdown-it passes no HTML on, and
 * DOMPurify lets through a short list of elements and attributes only.
 */

import "../vendor/markdown-it.umd.min.js";
import "../vendor/purify.min.js";
import { el } from "./dom.js";
import { t } from "./i18n.js";
import { copyButton } from "./notices.js";

const { DOMPurify, markdownit } = globalThis;
const PICTURE = /^data:image\/(?:gif|jpeg|png|webp);base64,/i;
const LINK = /^(?:https?|mailto):/i;

const md = markdownit({ html: false, linkify: true, breaks: true });
md.linkify.set({ fuzzyLink: false, fuzzyEmail: false });
md.validateLink = (address) => LINK.test(address) || PICTURE.test(address);

/** A picture that would have to be fetched stays text. */
const drawImage = md.renderer.rules.image;
md.renderer.rules.image = (tokens, i, options, env, self) => {
  const source = tokens[i].attrGet("src");
  if (PICTURE.test(source)) return drawImage(tokens, i, options, env, self);
  return md.utils.escapeHtml(`![${tokens[i].content}](${source})`);
};

/** The policy forbids style attributes, which markdown-it aligns table cells with. */
md.core.ruler.push("align", (state) => {
  for (const token of state.tokens) {
    const [, side] = token.attrGet("style")?.match(/^text-align:(\w+)$/) ?? [];
    if (side) token.attrs = [["class", `align-${side}`]];
  }
});

const ALLOWED = {
  ALLOWED_TAGS: [
    ..."p br hr h1 h2 h3 h4 h5 h6 strong em s code pre blockquote ul ol li a img".split(" "),
    ..."table thead tbody tr th td".split(" "),
  ],
  ALLOWED_ATTR: ["href", "title", "src", "alt", "class", "start"],
  ALLOWED_URI_REGEXP: LINK, // pictures as data: are DOMPurify's own rule
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  if (node.nodeName === "A") {
    node.setAttribute("target", "_blank");
    node.setAttribute("rel", "noopener noreferrer");
  }
});

/** Return the elements of a text; `env` collects its link definitions. */
export function render(text, env = {}) {
  const fragment = DOMPurify.sanitize(md.render(text, env), ALLOWED);
  fragment.querySelectorAll("pre").forEach(frameCode);
  fragment.querySelectorAll("table").forEach((table) => {
    const frame = el("div", { class: "table-frame" });
    table.replaceWith(frame);
    frame.append(table);
  });
  return fragment;
}

function frameCode(pre) {
  const code = pre.firstElementChild ?? pre;
  const [, name] = code.className.match(/^language-(\S+)/) ?? [];
  const head = el(
    "div",
    { class: "code-head" },
    el("span", { text: name ?? t("code") }),
    copyButton(t("copyCode"), () => code.textContent),
  );
  const frame = el("div", { class: "code-frame" }, head);
  pre.replaceWith(frame);
  frame.append(pre);
}

/**
 * Shows a text that grows. All blocks but the last are final and are drawn once; only the last one
 * is parsed again, so the cost of a step does not grow with the answer.
 */
export class GrowingText {
  constructor(box) {
    this.box = box;
    this.drawn = 0; // characters in final blocks
    this.env = {};
    this.tail = [];
    box.replaceChildren();
  }

  /** Draw what `text` now is, and return the text of the blocks that became final. */
  update(text, complete = false) {
    const rest = text.slice(this.drawn);
    const start = complete ? rest.length : lastBlock(rest);
    this.tail.forEach((node) => node.remove());
    this.tail = [];
    let spoken = "";
    if (start) {
      const blocks = render(rest.slice(0, start), this.env);
      spoken = blocks.textContent;
      this.box.append(blocks);
      this.drawn += start;
    }
    if (start < rest.length) {
      const fragment = render(rest.slice(start), this.env);
      this.tail = [...fragment.childNodes];
      this.box.append(fragment);
    }
    if (complete && Object.keys(this.env.references ?? {}).length) {
      this.box.replaceChildren(render(text)); // links may be defined after their use
    }
    return spoken;
  }
}

/** Return where the last block of a text starts. */
function lastBlock(text) {
  const lines = text.replaceAll("\r\n", " \n").replaceAll("\r", "\n");
  const tokens = [];
  md.block.parse(lines, md, {}, tokens);
  const last = tokens.findLast((token) => token.level === 0 && token.nesting >= 0);
  let start = 0;
  for (let line = last?.map[0] ?? 0; line > 0; line--) start = lines.indexOf("\n", start) + 1;
  return start;
}
