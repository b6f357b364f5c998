// The page: one state, every control showing it. No build step, nothing loaded from elsewhere, no text as markup.

import { Composer } from "./composer.js";
import { Controls } from "./controls.js";
import { $, later, notice } from "./dom.js";
import { History } from "./history.js";
import { Share } from "./share.js";
import { Space } from "./space.js";
import { askForKey, firstWeights, key, readAddress, same, state, writeAddress } from "./state.js";
import { Store, storageOf } from "./store.js";
import { asksForKey, getJson } from "./stream.js";
import { Talk } from "./talk.js";

const KEY = "dpa-key";
const OPEN = "dpa-open"; // the conversation of this tab, found again after a reload
const TOY = 10_000_000; // parameters: fewer cannot hold facts of the world, whatever they were trained on

const tab = storageOf("sessionStorage");
const remember = (name, value) => {
  try {
    if (value) tab.setItem(name, value);
    else tab.removeItem(name);
  } catch {
    // It is forbidden, or full: then the tab forgets.
  }
};
const recall = (name) => {
  try {
    return tab.getItem(name);
  } catch {
    return null;
  }
};

let page = null;

function build(space, wantsKey) {
  state.x = space.arc;
  state.weights = firstWeights(space);
  const store = new Store();
  const answerAgain = later(400, () => talk.isEarlier && talk.again());

  function show() {
    controls.show();
    showSettings();
  }

  function showSettings() {
    composer.show();
    share.show();
    writeAddress(space, talk.question);
  }

  function steer(weights, pressed = null, held = {}) {
    const moved = !same(weights, state.weights) || JSON.stringify(held) !== JSON.stringify(state.held);
    state.pressed = pressed;
    if (moved) Object.assign(state, { weights, held });
    show();
    if (moved && state.follow) answerAgain();
    else talk.showEarlier();
  }

  // What the address says is set and shown; nothing is asked.
  function followLink(link) {
    answerAgain.cancel();
    readAddress(space, link);
    // A link made here names the question that is on the page already.
    if (state.question === talk.turn?.question) state.question = "";
    if (space.names.length > 2) $("x-axis").value = space.names[state.x];
    controls.redrawFront();
    show();
    talk.showEarlier();
  }

  // Something began or ended.
  function changed(refusal) {
    showSettings();
    $("new").disabled = !talk.turn;
    remember(OPEN, talk.conversation?.id);
    list.current = talk.conversation?.id;
    if (refusal?.status === 401) askForKey();
  }

  function fresh() {
    talk.leave();
    talk.clear();
    changed();
    $("question").focus();
  }

  const talk = new Talk(space, store, { changed, show });
  const controls = new Controls(space, steer, () => talk.showAnswer());
  const composer = new Composer(space, talk, showSettings);
  const share = new Share(space, wantsKey, talk);
  const list = new History(
    store,
    (id) => {
      answerAgain.cancel();
      if (talk.open(id)) changed();
      $("question").focus();
    },
    (id) => {
      if (id === null || id === talk.conversation?.id) {
        talk.clear();
        changed();
      }
    },
  );
  $("new").addEventListener("click", fresh);
  // Not location.hash: the page's own delayed address may have taken its place before the event came.
  addEventListener("hashchange", (event) => followLink(new URL(event.newURL).hash));
  addEventListener("pagehide", () => talk.leave());

  const id = recall(OPEN);
  if (id && talk.open(id)) list.current = id;
  followLink(location.hash);
  changed();
  return { share };
}

// A toy has learned single questions: what was said before them only confuses it.
function showToy(parameters) {
  const isToy = parameters > 0 && parameters < TOY;
  $("toy").hidden = !isToy;
  state.memory = !isToy;
  const millions = parameters < 950_000 ? (parameters / 1e6).toFixed(1) : Math.round(parameters / 1e6);
  $("toy-size").textContent = `${millions} million parameters`;
}

// One menu at a time, and Escape closes it.
function closeMenus() {
  const menus = [...document.querySelectorAll("details.pop")];
  document.addEventListener("click", (event) => {
    for (const menu of menus) if (!event.composedPath().includes(menu)) menu.open = false;
  });
  document.addEventListener("keydown", (event) => {
    const open = event.key === "Escape" && menus.find((menu) => menu.open);
    if (!open) return;
    open.open = false;
    open.querySelector("summary").focus();
  });
}

let starting = false;

async function start() {
  if (page || starting) return;
  starting = true;
  try {
    const data = await getJson("v1/dpa/space", key());
    const wantsKey = Boolean(key()) || (await asksForKey());
    notice("");
    document.title = `${data.model}: ask, and say which way to go`;
    $("model-name").textContent = data.model;
    showToy(data.parameters);
    // Hidden boxes have no width to draw a front in.
    document.documentElement.dataset.ready = "true";
    page = build(new Space(data), wantsKey);
  } catch (refusal) {
    if (refusal.status === 401) askForKey();
    else notice(refusal.message);
    if (refusal.status === undefined) throw refusal;
  } finally {
    starting = false;
  }
}

// Nothing here is sent by the browser itself, not even while there is no server to ask.
document.addEventListener("submit", (event) => event.preventDefault());
closeMenus();
$("key").value = recall(KEY) ?? "";
$("key").addEventListener("input", () => {
  remember(KEY, key());
  notice(""); // it was about another key
  page?.share.show();
});
for (const kind of ["change", "submit"])
  $("key-form").addEventListener(kind, () => {
    $("key-box").open = false;
    start();
  });
start();
