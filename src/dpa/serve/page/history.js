// The list of conversations that this browser keeps: open one, export it, delete it, delete all.

import { $, announce, button, download, make, plural } from "./dom.js";
import { exported, titleOf } from "./conversation.js";

const day = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "short" });

export class History {
  // `open(id)` shows a conversation, `forgotten(id)` follows a deletion; null: of all.
  constructor(store, open, forgotten) {
    this.store = store;
    this.open = open;
    this.forgotten = forgotten;
    this.current = null;
    $("history").addEventListener("toggle", () => $("history").open && this.show());
    $("export-all").addEventListener("click", () => download("conversations.json", store.list().map(exported)));
    this.#confirmed($("delete-all"), () => {
      store.clear();
      this.forgotten(null);
      announce("All conversations are deleted.");
      this.show();
      $("history").querySelector("summary").focus();
    });
  }

  show() {
    const kept = this.store.list();
    $("talks").replaceChildren(...kept.map((conversation) => this.#row(conversation)));
    $("talks").hidden = !kept.length;
    for (const id of ["export-all", "delete-all"]) $(id).hidden = !kept.length;
    $("history-note").textContent = kept.length
      ? "Kept in this browser only; the oldest give way beyond 50."
      : this.store.storage
        ? "Nothing yet. What you ask is kept here, in this browser only."
        : "This browser does not let the page keep anything: conversations end with the page.";
  }

  #row(conversation) {
    const title = titleOf(conversation);
    const when = `${plural(conversation.turns.length, "turn")}, ${day.format(conversation.changed)}`;
    const opener = button("", () => {
      $("history").open = false;
      this.open(conversation.id);
    });
    opener.className = "talk-open";
    opener.append(make("span", { textContent: title }), make("small", { textContent: when }));
    opener.setAttribute("aria-current", conversation.id === this.current);
    const out = button("Export", () => download(`conversation-${conversation.id}.json`, exported(conversation)), { className: "quiet" });
    out.setAttribute("aria-label", `Export: ${title}`);
    const remove = button("Delete", () => {
      this.store.remove(conversation.id);
      this.forgotten(conversation.id);
      announce("The conversation is deleted.");
      const place = [...$("talks").children].indexOf(row);
      this.show();
      const next = $("talks").children[place] ?? $("talks").lastElementChild;
      (next?.querySelector("button:last-child") ?? $("history").querySelector("summary")).focus();
    }, { className: "quiet" });
    remove.setAttribute("aria-label", `Delete: ${title}`);
    const row = make("li", {}, opener, out, remove);
    return row;
  }

  // What cannot be undone is pressed twice.
  #confirmed(pressed, action) {
    const first = pressed.textContent;
    const rest = () => {
      pressed.textContent = first;
      delete pressed.dataset.sure;
    };
    pressed.addEventListener("blur", rest);
    pressed.addEventListener("click", () => {
      if (pressed.dataset.sure) {
        rest();
        action();
        return;
      }
      pressed.dataset.sure = "true";
      pressed.textContent = "Press again to delete all";
    });
  }
}
