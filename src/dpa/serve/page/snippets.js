// The request the page would send, written for a terminal, for Python, and for a server that is not ours.

const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;
const pretty = (body) => `{\n${Object.entries(body).map(([name, value]) => `    "${name}": ${JSON.stringify(value)}`).join(",\n")}\n  }`;

// A request's body. `settings`: seed, temperature, maxTokens; `direction`: a mapping, or null to state none.
export function bodyOf(model, messages, settings, direction) {
  return {
    model,
    messages,
    ...(direction ? { dpa: direction } : {}),
    seed: settings.seed,
    temperature: settings.temperature,
    max_tokens: settings.maxTokens,
  };
}

export function curl(origin, hasKey, body) {
  return [
    `curl ${origin}/v1/chat/completions \\`,
    `  -H 'Content-Type: application/json' \\`,
    ...(hasKey ? [`  -H "Authorization: Bearer $DPA_API_KEY" \\`] : []),
    `  -d ${quoted(pretty(body))}`,
  ].join("\n");
}

export function python(origin, hasKey, body, extra = { dpa: body.dpa }) {
  const key = hasKey ? `os.environ["DPA_API_KEY"]` : `"none"`;
  return [
    ...(hasKey ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${JSON.stringify(`${origin}/v1`)}, api_key=${key})`,
    "answer = client.chat.completions.create(",
    `    model=${JSON.stringify(body.model)},`,
    `    messages=${JSON.stringify(body.messages)},`,
    `    seed=${body.seed},`,
    `    temperature=${body.temperature},`,
    `    max_tokens=${body.max_tokens},`,
    `    extra_body=${JSON.stringify(extra)},`,
    ")",
    "print(answer.choices[0].message.content)",
  ].join("\n");
}

// vLLM, SGLang, llama.cpp, transformers serve: the model's own chat template reads `preference`.
export function stock(origin, hasKey, body) {
  return [
    "# Any server that passes template variables; here it is this one. For a stock server of",
    "# this model (vLLM, SGLang, llama.cpp, transformers serve) change base_url and model.",
    python(origin, hasKey, body, { chat_template_kwargs: { preference: body.dpa } }),
  ].join("\n");
}
