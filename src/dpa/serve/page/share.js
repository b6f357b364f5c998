// "Take it with you": the link, and the very request as curl, Python, and for a server that is not ours.

import { $, copy } from "./dom.js";
import { curl, python, stock } from "./snippets.js";
import { addressOf, key, state } from "./state.js";

const WRITERS = { curl, python, stock };

export class Share {
  // `wantsKey`: a client needs one. `asked()` gives the question shown and the body of its steered request.
  constructor(space, wantsKey, asked) {
    this.wantsKey = wantsKey;
    this.asked = asked;
    this.tabs = [...document.querySelectorAll('[role="tab"]')];
    $("copy-link").addEventListener("click", () => {
      history.replaceState(null, "", addressOf(space, this.asked().question));
      copy(location.href, $("copy-link"));
    });
    $("copy-snippet").addEventListener("click", () => copy($("snippet").textContent, $("copy-snippet")));
    this.tabs.forEach((tab, index) => {
      tab.addEventListener("click", () => {
        state.snippet = tab.dataset.kind;
        this.show();
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
    const origin = location.origin + location.pathname.replace(/\/[^/]*$/, "");
    $("snippet").firstElementChild.textContent = WRITERS[state.snippet](origin, this.wantsKey || Boolean(key()), this.asked().body);
    for (const tab of this.tabs) {
      const chosen = tab.dataset.kind === state.snippet;
      tab.setAttribute("aria-selected", chosen);
      tab.tabIndex = chosen ? 0 : -1;
      if (chosen) $("snippet").setAttribute("aria-labelledby", tab.id);
    }
  }
}
