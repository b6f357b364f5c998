// The conversation on the page: the turn that is being answered, the earlier ones above it, and what is asked for each.
// The live turn has two answers (default and steered) or, as a sweep, five; what a turn is: conversation.js.

import { Answer, kept, rangeOf } from "./answer.js";
import { messagesOf, newConversation, newId } from "./conversation.js";
import { $, announce, button, leadTo, make, plural } from "./dom.js";
import { bodyOf } from "./snippets.js";
import { add, norm } from "./space.js";
import { fitting, key, state, within } from "./state.js";
import { sweeps } from "./sweep.js";
import { differences } from "./words.js";

export class Talk {
  // `changed(refusal)` is called whenever something began or ended, `show()` when another direction was set.
  constructor(space, store, { changed, show }) {
    this.space = space;
    this.store = store;
    this.changed = changed;
    this.show = show;
    this.sweeps = sweeps(space);
    $("along").replaceChildren(...this.sweeps.map(({ name }) => make("option", { value: name, textContent: name })));
    $("along").addEventListener("change", () => this.sweep(""));
    $("reseed").addEventListener("click", () => {
      state.seed = Math.floor(Math.random() * 2 ** 31);
      this.again();
    });
    $("marks").checked = state.marks;
    $("marks").addEventListener("change", () => {
      state.marks = $("marks").checked;
      this.#mark();
    });
    this.clear();
  }

  get running() {
    return this.cards.some((card) => card.running);
  }

  get isPair() {
    return this.turn?.kind === "pair";
  }

  // --- what the user does ---

  // Ask this as the server does by default and in the one that is set; nothing: the last question again.
  ask(question) {
    if (!question && !this.turn) return;
    const anew = question || !this.isPair;
    if (anew) this.#begin(question || this.turn.question, "pair", Boolean(question));
    this.#askPair();
    if (anew) leadTo($("answers"));
  }

  // ... or in five directions.
  sweep(question) {
    if (!question && !this.turn) return;
    this.#begin(question || this.turn.question, "sweep", Boolean(question));
    this.#askSweep();
    leadTo($("answers"));
  }

  again() {
    if (this.isPair) this.#askPair();
    else this.#askSweep();
  }

  stop() {
    for (const card of this.cards) card.stop();
  }

  // Whether the steered answer is that of another direction than the one that is set.
  get isEarlier() {
    if (!this.isPair) return false;
    return JSON.stringify(this.steeredCard.direction) !== JSON.stringify(this.#wish());
  }

  showEarlier() {
    if (this.isPair) this.steeredCard.card.classList.toggle("earlier", this.isEarlier);
  }

  // Where one column is all there is, keep the steered answer in sight of whoever taps a preset.
  showAnswer() {
    if (this.isPair && matchMedia("(max-width: 899px)").matches) leadTo(this.steeredCard.card, "nearest");
  }

  // What is being written is kept as far as it came, before the page turns to something else.
  leave() {
    if (this.running) this.#save();
  }

  clear() {
    this.cards?.forEach((card) => card.stop());
    this.conversation = null;
    this.turn = null;
    this.cards = [];
    $("past").replaceChildren();
    $("cards").replaceChildren();
    this.#show();
  }

  // Whether there was such a conversation.
  open(id) {
    this.leave();
    const conversation = this.store.read(id);
    if (!conversation) return false;
    this.clear();
    const last = conversation.turns.at(-1);
    this.conversation = { ...conversation, turns: conversation.turns.slice(0, -1) };
    $("past").replaceChildren(...this.conversation.turns.map((turn) => this.#past(turn)));
    this.#live({ ...last });
    last.answers.forEach((answer, place) => {
      this.cards[place].restore(answer);
      if (this.cards[place] !== this.steeredCard) this.cards[place].label(answer.label);
    });
    if (!this.isPair) this.#showKept();
    this.#compare();
    for (const field of Object.keys(this.#settings())) state[field] = within(field, last[field]);
    this.#turnTo(last.answers[last.kept].direction);
    this.showEarlier();
    return true;
  }

  // Set and show the direction of an answer that is there; it asks nothing.
  #turnTo(direction) {
    const wish = fitting(this.space, direction);
    if (wish) Object.assign(state, wish, { pressed: null });
    this.show();
  }

  // --- what is asked ---

  // The question in the box, or the live turn's where it is empty; what the link says.
  get question() {
    return state.question || this.turn?.question || "";
  }

  // The body of its steered request; what the snippets show.
  request() {
    const before = this.#before(Boolean(state.question) || !this.turn);
    return this.#body(before, this.question || "…", this.#wish());
  }

  // The direction that is set, or the target.
  #wish() {
    return this.space.wish(state.weights, state.held);
  }

  #before(isNew) {
    if (!state.memory || !this.conversation) return [];
    return isNew && this.turn ? [...this.conversation.turns, this.#record()] : this.conversation.turns;
  }

  #body(before, question, wish, model = this.space.data.model) {
    return bodyOf(model, messagesOf(before, question), state, wish);
  }

  #bodies(wishes = { steered: this.#wish() }) {
    const before = this.#before(false);
    const scored = this.space.data.scorer ? { dpa_options: { scores: true } } : {};
    const of = (wish, model) => ({ ...this.#body(before, this.turn.question, wish, model), ...scored });
    const plain = state.compare === "base" ? of(null, `${this.space.data.model}@base`) : of(this.space.usual);
    return { plain, ...Object.fromEntries(Object.entries(wishes).map(([name, wish]) => [name, of(wish)])) };
  }

  #settings() {
    return { seed: state.seed, temperature: state.temperature, maxTokens: state.maxTokens };
  }

  #begin(question, kind, isNew) {
    this.stop();
    this.conversation ??= newConversation(this.space.data.model);
    if (isNew && this.turn) {
      const turn = this.#record();
      if (turn.answers.some((answer) => answer.text)) {
        this.conversation.turns.push(turn);
        $("past").append(this.#past(turn));
      }
    }
    this.#live({ question, ...this.#settings(), kind, along: $("along").value, kept: 1, answers: [] });
  }

  #askPair() {
    const { plain, steered } = this.#bodies();
    Object.assign(this.turn, this.#settings());
    const usual = this.space.usual ? "Default" : "Default: no direction";
    this.plainCard.label(state.compare === "base" ? "Told no direction" : usual);
    this.steeredCard.run(steered, key);
    // The other answer does not depend on the direction: it is kept while only the direction changes.
    const stays = this.plainCard.asked === JSON.stringify(plain) && (this.plainCard.done || this.plainCard.running);
    if (!stays) this.plainCard.run(plain, key);
    announce(stays ? "Answering again in the new direction." : "Both answers are being written.");
  }

  #askSweep() {
    const { directions } = this.sweeps.find(({ name }) => name === $("along").value) ?? this.sweeps[0];
    Object.assign(this.turn, this.#settings());
    const bodies = this.#bodies(directions.map(({ weights }) => this.space.mapping(weights)));
    this.cards.forEach((card, place) => card.run(bodies[place], key));
    announce(`${directions.length} directions are being answered.`);
  }

  // --- what is shown ---

  #live(turn) {
    this.turn = turn;
    const pair = turn.kind === "pair";
    const { names } = this.space;
    const heard = (card, how) => this.#heard(card, how);
    if (pair) {
      this.plainCard = new Answer("Default", names, heard, "default");
      this.steeredCard = new Answer("Steered", names, heard, "steered");
      this.steeredCard.card.classList.add("steered");
      this.cards = [this.plainCard, this.steeredCard];
    } else {
      const sweep = this.sweeps.find(({ name }) => name === turn.along) ?? this.sweeps[0];
      $("along").value = sweep.name;
      const count = turn.answers.length || sweep.directions.length;
      this.cards = Array.from({ length: count }, (_, place) => new Answer(sweep.directions[place]?.label ?? "", names, heard));
      if (!turn.answers.length) turn.kept = nearest(sweep.directions, state.weights);
      this.cards.forEach((card, place) =>
        card.part("footer").append(button("Go on with this", () => this.#keep(place), { className: "keep" })),
      );
    }
    $("cards").className = pair ? "cards" : "cards sweep";
    $("cards").replaceChildren(...this.cards.map(({ card }) => card));
    this.#show();
  }

  #show() {
    const sweep = this.turn?.kind === "sweep";
    const [place, name] = this.turn ? ["#answers", "answers"] : ["#question", "question"];
    Object.assign($("skip"), { href: place, textContent: `Skip to the ${name}` });
    $("welcome").hidden = Boolean(this.turn);
    $("answers").hidden = !this.turn;
    $("asked").textContent = this.turn?.question ?? "";
    $("along-pick").hidden = !sweep;
    $("mark-pick").hidden = sweep;
    $("columns").classList.toggle("wide", sweep);
    $("mark-note").textContent = "";
    if (sweep) this.#showKept();
  }

  #showKept() {
    this.cards.forEach(({ card, part, text, running }, place) => {
      card.classList.toggle("steered", place === this.turn.kept);
      part(".keep").disabled = !text; // a conversation does not go on from nothing
      const chosen = place === this.turn.kept && (running || text !== "");
      part(".keep").setAttribute("aria-pressed", chosen);
      part(".keep").textContent = chosen ? "Going on with this" : "Go on with this";
    });
  }

  #keep(place) {
    this.turn.kept = place;
    this.#showKept();
    this.#turnTo(this.cards[place].direction);
    this.#save();
  }

  #past(turn) {
    const { names } = this.space;
    const others = turn.answers.filter((_, place) => place !== turn.kept).map((answer) => kept(answer, names));
    const summary = others.length === 1 ? "The other answer" : `The other ${others.length} answers`;
    return make(
      "article",
      { className: "past" },
      make("h2", { className: "question", dir: "auto", textContent: turn.question }),
      kept(turn.answers[turn.kept], names),
      make("details", { className: "finer" }, make("summary", { textContent: summary }), ...others),
    );
  }

  // What a card says of itself: it is asked (again, perhaps), its first words are there, it has ended.
  #heard(card, how) {
    if (!this.cards.includes(card)) return;
    if (!this.isPair) this.#showKept();
    if (how === "asked") {
      this.#mark(false);
      this.showEarlier();
      this.changed();
    } else if (how !== "begun") this.#ended(card, how);
  }

  #ended(card, how) {
    this.#compare();
    this.changed(card.refusal);
    if (this.running) return;
    this.#save();
    const trouble = this.cards.map(({ refusal }) => refusal).findLast(Boolean);
    if (trouble) announce(trouble.message);
    else if (how === "stopped") announce("Stopped.");
    else if (this.isPair) announce(`Both answers are there: ${plural(this.plainCard.words, "word")}, and steered ${plural(this.steeredCard.words, "word")}.`);
    else announce(`${this.cards.length} answers are there: ${this.cards.map(({ words }) => words ?? 0).join(", ")} words.`);
  }

  #compare() {
    const range = rangeOf(this.cards);
    for (const card of this.cards) card.showScores(range);
    if (!this.isPair) return;
    this.steeredCard.showDifference(this.plainCard, state.compare === "base" ? "without one" : "the default");
    if (!this.running) this.#mark();
  }

  // Mark the words that the other answer lacks; once, when both are there.
  #mark(wanted = state.marks) {
    if (!this.isPair) return;
    const [plain, steered] = this.cards;
    const both = wanted && plain.text && steered.text && !this.running;
    const runs = both ? differences(plain.text, steered.text) : null;
    plain.mark(runs?.[0], "del");
    steered.mark(runs?.[1], "ins");
    const differ = runs?.some((list) => list.some(([, only]) => only));
    $("mark-note").textContent = !both
      ? ""
      : !runs
        ? "Too long to compare by word."
        : differ
          ? "Underlined: words the other answer lacks."
          : "The two answers are the same, word for word.";
  }

  // --- what is kept ---

  // An answer that is asked anew gives its place up with its first word.
  #record() {
    const answers = this.cards.map((card, place) => {
      const answer = card.record();
      return answer.text || card.done ? answer : (this.turn.answers[place] ?? answer);
    });
    const [, steered] = answers;
    const wish = this.isPair && fitting(this.space, steered.direction);
    if (wish) steered.label = this.space.wishWords(wish.weights, wish.held);
    return { ...this.turn, kept: Math.min(this.turn.kept, answers.length - 1), answers };
  }

  #save() {
    const turn = this.#record();
    if (!turn.answers.some((answer) => answer.text)) return;
    this.turn.answers = turn.answers;
    const { conversation } = this;
    // Another tab went on with it since: that one keeps its turns, and this one goes on under another name.
    const isOthers = this.store.read(conversation.id)?.changed > conversation.changed;
    if (isOthers) conversation.id = newId();
    conversation.changed = Date.now();
    const whole = { ...conversation, turns: [...conversation.turns, turn] };
    $("unkept").hidden = this.store.write(whole);
    if (isOthers) this.changed();
  }
}

// The place of the direction nearest to these weights.
function nearest(directions, weights) {
  const far = directions.map((direction) => norm(add(direction.weights, weights, -1)));
  return far.indexOf(Math.min(...far));
}
