// "Take it with you": the link, and the very request as curl, Python, and for a server that is not ours.

import { $, copy, later } from "./dom.js";
import { curl, python, stock } from "./snippets.js";
import { addressOf, key, state } from "./state.js";

const WRITERS = { curl, python, stock };

export class Share {
  // A long conversation is not written out at every keystroke and turn of the dial.
  #fillSoon = later(100, () => this.#fill());

  // `wantsKey`: a client needs one.
  constructor(space, wantsKey, talk) {
    this.wantsKey = wantsKey;
    this.talk = talk;
    this.tabs = [...document.querySelectorAll('[role="tab"]')];
    $("copy-link").addEventListener("click", () => {
      history.replaceState(null, "", addressOf(space, talk.question));
      copy(location.href, $("copy-link"));
    });
    $("copy-snippet").addEventListener("click", () => {
      this.#fill();
      copy($("snippet").textContent, $("copy-snippet"));
    });
    this.tabs.forEach((tab, index) => {
      tab.addEventListener("click", () => {
        state.snippet = tab.dataset.kind;
        this.show();
        this.#fill();
      });
      tab.addEventListener("keydown", (event) => {
        const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
        if (!step) return;
        const next = this.tabs[(index + step + this.tabs.length) % this.tabs.length];
        next.focus();
        next.click();
      });
    });
  }

  show() {
    this.#fillSoon();
    for (const tab of this.tabs) {
      const chosen = tab.dataset.kind === state.snippet;
      tab.setAttribute("aria-selected", chosen);
      tab.tabIndex = chosen ? 0 : -1;
      if (chosen) $("snippet").setAttribute("aria-labelledby", tab.id);
    }
  }

  #fill() {
    const origin = location.origin + location.pathname.replace(/\/[^/]*$/, "");
    const hasKey = this.wantsKey || Boolean(key());
    $("snippet").firstElementChild.textContent = WRITERS[state.snippet](origin, hasKey, this.talk.request());
  }
}
