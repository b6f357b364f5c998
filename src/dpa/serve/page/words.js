// Words of answers: how many, and which of two answers' words the other lacks. Nothing here touches the page.

// Counts words as they arrive, each character read once.
export class WordCount {
  #inWord = false;
  count = 0;

  add(piece) {
    const begun = this.#inWord && /^\S/.test(piece) ? 1 : 0;
    this.count += (piece.match(/\S+/g)?.length ?? 0) - begun;
    if (piece) this.#inWord = /\S$/.test(piece);
    return this.count;
  }
}

const MOST_CELLS = 9_000_000; // 18 MB for a moment: two answers of 3,000 words that share no beginning and no end

// Two texts as runs [text, isOnlyHere], together the whole text: what is not in their longest common subsequence of
// words. White space before a word goes with it. Null where they are too long to compare.
export function differences(before, after) {
  const [a, b] = [pieces(before), pieces(after)];
  const [aWords, bWords] = [a, b].map((list) => list.map((piece) => piece.trim()));
  let start = 0;
  while (start < a.length && start < b.length && aWords[start] === bWords[start]) start++;
  let end = 0;
  while (end < a.length - start && end < b.length - start && aWords.at(-1 - end) === bWords.at(-1 - end)) end++;
  const inner = (list) => list.slice(start, list.length - end);
  const kept = common(inner(aWords), inner(bWords));
  if (!kept) return null;
  return [a, b].map((list, side) => {
    const alone = (place) => place >= start && place < list.length - end && !kept[side].has(place - start);
    return runs(list, alone);
  });
}

const pieces = (text) => text.match(/\s*\S+|\s+$/g) ?? [];

// The places of a longest common subsequence in each of two lists.
function common(a, b) {
  const width = b.length + 1;
  if ((a.length + 1) * width > MOST_CELLS) return null;
  const numbers = new Map(); // numbers are compared ten times faster than words
  const numbered = (list) => Int32Array.from(list, (word) => numbers.get(word) ?? numbers.set(word, numbers.size).size - 1);
  [a, b] = [numbered(a), numbered(b)];
  const longest = new Uint16Array((a.length + 1) * width); // of a[i..] and b[j..]
  for (let i = a.length - 1; i >= 0; i--)
    for (let j = b.length - 1; j >= 0; j--)
      longest[i * width + j] =
        a[i] === b[j]
          ? longest[(i + 1) * width + j + 1] + 1
          : Math.max(longest[(i + 1) * width + j], longest[i * width + j + 1]);
  const places = [new Set(), new Set()];
  for (let i = 0, j = 0; i < a.length && j < b.length; ) {
    if (a[i] === b[j]) {
      places[0].add(i++);
      places[1].add(j++);
    } else if (longest[(i + 1) * width + j] >= longest[i * width + j + 1]) i++;
    else j++;
  }
  return places;
}

function runs(list, alone) {
  const found = [];
  list.forEach((piece, place) => {
    const only = alone(place) && piece.trim() !== "";
    if (found.at(-1)?.[1] === only) found.at(-1)[0] += piece;
    else if (only && found.length) {
      // The space before the first marked word is not marked.
      const word = piece.trimStart();
      found.at(-1)[0] += piece.slice(0, piece.length - word.length);
      found.push([word, true]);
    } else found.push([piece, only]);
  });
  return found;
}
