// A conversation as data: turns, what of them goes to the API, what is kept and exported. Nothing here touches the page.
//
// turn: { question, seed, temperature, maxTokens, kind: "pair" | "sweep", along, kept, answers }. `answers` of a pair are
// the default's and the steered one, of a sweep the five; `kept` is the place of the one the conversation goes on from.
// answer: { label, direction, told, text, words, scores, state }; scores are the reward model's, by objective.

import { HELD } from "./space.js";

const MOST_TURNS = 200;
const MOST_TEXT = 200_000;

export const newId = () => `${Date.now().toString(36)}-${Math.random().toString(36).slice(2, 8)}`;

export const newConversation = (model) => ({ id: newId(), model, changed: Date.now(), turns: [] });

// The messages of a question after these turns; a turn that was never answered is left out.
export function messagesOf(turns, question) {
  const said = turns.flatMap((turn) => {
    const answer = turn.answers[turn.kept];
    if (!answer?.text) return [];
    return [
      { role: "user", content: turn.question },
      { role: "assistant", content: answer.text },
    ];
  });
  return [...said, { role: "user", content: question }];
}

export const titleOf = (conversation) => conversation.turns[0]?.question.split("\n")[0].trim().slice(0, 120) || "Untitled";

export function exported(conversation) {
  return {
    format: "dpa conversation, version 1",
    model: conversation.model,
    changed: new Date(conversation.changed).toISOString(),
    turns: conversation.turns.map((turn) => ({
      question: turn.question,
      seed: turn.seed,
      temperature: turn.temperature,
      max_tokens: turn.maxTokens,
      kept: turn.kept,
      answers: turn.answers.map(({ label, direction, told, text, words, scores, state }) => ({
        label,
        direction,
        told,
        text,
        words,
        model_reward: scores,
        state,
      })),
    })),
    messages: messagesOf(conversation.turns, "").slice(0, -1),
  };
}

// What was read from storage as a conversation of this shape, or null: anybody may have written there.
export function readConversation(value) {
  if (!value || typeof value !== "object" || !Array.isArray(value.turns)) return null;
  if (typeof value.id !== "string" || !/^[\w-]{1,40}$/.test(value.id)) return null;
  const turns = value.turns.slice(-MOST_TURNS).map(readTurn);
  if (!turns.length || turns.includes(null)) return null;
  return { id: value.id, model: text(value.model), changed: time(value.changed), turns };
}

function readTurn(value) {
  if (!value || !Array.isArray(value.answers) || !value.answers.length) return null;
  const answers = value.answers.slice(0, 5).map(readAnswer);
  const sweep = value.kind === "sweep";
  if (answers.includes(null) || (!sweep && answers.length !== 2)) return null;
  return {
    question: text(value.question),
    seed: number(value.seed, 1),
    temperature: number(value.temperature, 0.7),
    maxTokens: number(value.maxTokens, 256),
    kind: sweep ? "sweep" : "pair",
    along: text(value.along),
    kept: Math.min(answers.length - 1, Math.max(0, Math.round(number(value.kept, 0)))),
    answers,
  };
}

function readAnswer(value) {
  if (!value || typeof value !== "object") return null;
  return {
    label: text(value.label),
    direction: numbers(value.direction, (one) => HELD.test(one)),
    told: text(value.told),
    text: text(value.text),
    words: number(value.words, 0),
    scores: numbers(value.scores),
    state: text(value.state),
  };
}

const text = (value) => (typeof value === "string" ? value.slice(0, MOST_TEXT) : "");
const number = (value, otherwise) => (Number.isFinite(value) ? value : otherwise);
const time = (value) => (Number.isFinite(new Date(number(value, 0)).getTime()) ? number(value, 0) : 0); // of a day that there is

function numbers(value, orElse = () => false) {
  if (!value || typeof value !== "object") return null;
  return Object.fromEntries(Object.entries(value).slice(0, 100).filter(([, one]) => Number.isFinite(one) || orElse(one)));
}
