// The few words in which the other files speak of the document.

export const $ = (id) => document.getElementById(id);

export const make = (tag, properties = {}, ...children) => {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
};

// A button that does `action(button)` when pressed.
export const button = (text, action, properties = {}) => {
  const node = make("button", { type: "button", textContent: text, ...properties });
  node.addEventListener("click", () => action(node));
  return node;
};

// `action`, once nothing has been wanted for `wait` milliseconds, unless `cancel` comes first.
export const later = (wait, action) => {
  let timer;
  const soon = (...given) => {
    clearTimeout(timer);
    timer = setTimeout(() => action(...given), wait);
  };
  soon.cancel = () => clearTimeout(timer);
  return soon;
};

export const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

export const announce = (text) => ($("status").textContent = text);

export function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

export function leadTo(node, block = "start") {
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  node.scrollIntoView({ block, behavior: calm ? "auto" : "smooth" });
}

export async function copy(text, pressed) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Without a secure context there is no clipboard: take the old way.
    const box = make("textarea", { value: text });
    document.body.append(box);
    box.select();
    document.execCommand("copy");
    box.remove();
    pressed.focus({ preventScroll: true });
  }
  pressed.dataset.label ??= pressed.textContent;
  pressed.textContent = "Copied";
  announce("Copied.");
  setTimeout(() => (pressed.textContent = pressed.dataset.label), 1500);
}

export function download(name, value) {
  const url = URL.createObjectURL(new Blob([JSON.stringify(value, null, 2)], { type: "application/json" }));
  make("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}
