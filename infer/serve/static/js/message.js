/** How one message looks. */

import { rateOf } from "./answer.js";
import * as actions from "./app.js";
import { app } from "./app.js";
import { focusComposer } from "./composer.js";
import { openCalls, versions } from "./conversation.js";
import { el, fitHeight, iconButton, isPlainEnter } from "./dom.js";
import { formatNumber, join, t } from "./i18n.js";
import { GrowingText, render } from "./markdown.js";
import { copyButton, say } from "./notices.js";
import { problemOf } from "./problem.js";
import { callBlock, resultBlock } from "./tools.js";

const ENDINGS = {
  length: "endLength",
  loop: "endLoop",
  tool_calls: "endTool",
  observation: "endTool",
  content_filter: "endFilter",
  stopped: "endStopped",
  closed: "endClosed",
};
const SILENT = new Set(["stop", "error"]);

export class MessageView {
  constructor(message) {
    this.message = message;
    this.body = el("div", {
      dir: "auto",
      class: `body ${message.role === "assistant" ? "prose" : "plain"}`,
    });
    this.tools = el("div", { class: "tools" });
    this.note = el("div", { class: "note" });
    this.bar = el("div", { class: "bar" });
    this.name = el("h2", { class: message.role === "assistant" ? "author" : "offscreen" });
    this.node = el(
      "article",
      { class: `message ${message.role}` },
      this.name,
      this.body,
      this.tools,
      this.note,
      this.bar,
    );
  }

  /** Draw all but what has not changed. */
  update() {
    const { message } = this;
    const going = actions.running();
    const live = going?.message === message;
    const all = versions(app.current, message);
    const last = app.current.head === message.id;
    const state = [message.finish, all.indexOf(message), all.length, Boolean(going), last];
    const open = message.role === "assistant" && !going ? openCalls(app.current, message) : [];
    const known = [...state, message.content.length, ...open.map(({ id }) => id)].join();
    if (live) {
      this.node.setAttribute("aria-busy", "true");
      this.bar.replaceChildren();
      this.step(going);
      return;
    }
    if (this.known === known) return;
    this.known = known;
    this.node.removeAttribute("aria-busy");
    this.name.textContent = this.author();
    this.drawBody();
    this.drawTools(open);
    this.drawNote();
    this.drawBar(all, Boolean(going), last);
  }

  author() {
    const { role, model } = this.message;
    return role === "user" ? t("you") : role === "tool" ? t("toolResult") : model || t("assistant");
  }

  /** Draw an answer that is on its way. */
  step(going) {
    const { message } = this;
    this.name.textContent = this.author();
    const again = !this.growing && message.content; // shown before, in this conversation
    this.growing ??= new GrowingText(this.body);
    const spoken = this.growing.update(message.content);
    if (spoken.trim() && !again) say(spoken);
    if (message.calls) this.drawTools([]);
    this.note.replaceChildren(el("p", { class: "progress" }, dots(), progressOf(going)));
  }

  drawBody() {
    const { role, content } = this.message;
    if (role === "tool") this.body.replaceChildren(resultBlock(this.message));
    else if (role === "user") this.body.textContent = content;
    else if (this.growing) {
      const spoken = this.growing.update(content, true);
      this.growing = null;
      say(join([spoken, this.ending() ?? t("done")]));
    } else this.body.replaceChildren(render(content));
  }

  drawTools(open) {
    const { calls = [] } = this.message;
    const blocks = calls.map((call) => {
      const take = (text) => {
        actions.addResult(this.message, call, text);
        focusComposer();
      };
      return callBlock(call, open.includes(call) ? take : null);
    });
    this.tools.replaceChildren(...blocks);
  }

  /** Say why the answer ended, unless it is complete. */
  ending() {
    const { role, finish, content, calls, error } = this.message;
    if (role !== "assistant") return null;
    if (error && finish === "error") return problemOf(error)[0];
    if (SILENT.has(finish)) return content || calls ? null : t("emptyAnswer");
    return finish in ENDINGS ? t(ENDINGS[finish]) : t("endOther", { reason: finish });
  }

  drawNote() {
    const { error, finish } = this.message;
    const ending = this.ending();
    if (error && finish === "error") this.note.replaceChildren(this.problem());
    else this.note.replaceChildren(...(ending ? [el("p", { text: ending })] : []));
  }

  problem() {
    const { error } = this.message;
    const [what, ...more] = problemOf(error);
    const again = () => {
      actions.retry(this.message);
      focusComposer();
    };
    return el(
      "div",
      { class: "problem" },
      el("p", { class: "what", text: what }),
      ...more.map((text) => el("p", { text })),
      error.requestId && el("p", { class: "faint", text: t("requestId", { id: error.requestId }) }),
      el("button", { type: "button", class: "button", text: t("retry"), onclick: again }),
    );
  }

  drawBar(all, going, last) {
    const { message } = this;
    const buttons = [];
    const answer = message.role === "assistant";
    if (all.length > 1) buttons.push(this.versionBar(all, going));
    if (message.role !== "tool" && message.content) {
      buttons.push(copyButton(t(answer ? "copyAnswer" : "copyMessage"), () => message.content));
      if (!going) buttons.push(iconButton("edit", t("editMessage"), () => this.edit()));
    }
    if (!going && (answer ? !message.error : last)) {
      buttons.push(
        iconButton("retry", t("regenerate"), () => {
          actions.retry(message);
          focusComposer();
        }),
      );
    }
    const stats = statsOf(message);
    this.bar.replaceChildren(...buttons, ...(stats ? [stats] : []));
  }

  versionBar(all, going) {
    const at = all.indexOf(this.message);
    const step = (by, name, label) => {
      const props = { disabled: going || !all[at + by], "data-step": by };
      return iconButton(name, t(label), () => actions.showVersion(all[at + by]), props);
    };
    return el(
      "span",
      { class: "versions" },
      step(-1, "left", "previousVersion"),
      el("span", {
        "aria-label": t("version", { n: at + 1, total: all.length }),
        role: "img",
        text: `${at + 1}/${all.length}`,
      }),
      step(1, "right", "nextVersion"),
    );
  }

  edit() {
    const { message } = this;
    const area = el("textarea", {
      "aria-label": t("editMessage"),
      value: message.content,
      oninput: () => fitHeight(area),
      onkeydown: (event) => {
        if (isPlainEnter(event) && message.role === "user") submit(event);
        if (event.key === "Escape" && !event.isComposing) leave(event);
      },
    });
    const leave = (event) => {
      event.stopPropagation();
      form.replaceWith(this.body);
      this.node.classList.remove("editing");
      this.bar.querySelector("button")?.focus();
    };
    const submit = (event) => {
      event.preventDefault();
      if (!area.value.trim()) return;
      leave(event);
      actions.edit(message, area.value);
      focusComposer();
    };
    const form = el(
      "form",
      { class: "edit-form", onsubmit: submit },
      area,
      el(
        "div",
        { class: "row end" },
        el("button", { type: "button", class: "button", text: t("cancel"), onclick: leave }),
        el("button", {
          type: "submit",
          class: "button primary",
          text: t(message.role === "user" ? "send" : "save"),
        }),
      ),
    );
    this.body.replaceWith(form);
    this.node.classList.add("editing");
    fitHeight(area);
    area.focus();
  }
}

const dots = () => el("span", { class: "dots", "aria-hidden": "true" }, el("i"), el("i"), el("i"));

/** Say where an answer on its way is. */
function progressOf({ phase, again, seen, message, deltas }) {
  const now = performance.now();
  const still = Math.floor((now - seen) / 1000);
  if (phase === "busy") return t("busyWait", { n: Math.max(Math.ceil((again - now) / 1000), 0) });
  if (phase === "waiting") return still < 4 ? "" : t("waitingLong", { n: still });
  if (still >= 10) return t("stalled", { n: still });
  const usage = { completion: deltas, approximate: true };
  return summary({ usage, timing: message.timing });
}

function summary({ usage, timing }) {
  const count = t("tokens", { n: usage.completion });
  const rate = rateOf({ usage, timing });
  const parts = [usage.approximate ? t("about", { text: count }) : count];
  if (rate) parts.push(t("rate", { n: Number(rate.toPrecision(3)) }));
  return parts.join(" · ");
}

function statsOf({ role, usage, timing }) {
  if (role !== "assistant" || !usage) return null;
  const first = formatNumber(Number(((timing?.first ?? 0) / 1000).toPrecision(2)));
  const title = usage.approximate ? undefined : t("statsTitle", { ...usage, first });
  return el("span", { class: "stats", title, text: summary({ usage, timing }) });
}
