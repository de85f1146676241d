// A conversation as the body of a request, and that body as code somebody can run.

/** Body of POST v1/chat/completions. `turns` are those before; their answers are part of the prompt. */
export function chatBody(model, turns, question, settings) {
  const messages = [];
  for (const turn of turns) {
    messages.push(userMessage(turn.question), { role: "assistant", content: turn.content });
  }
  messages.push(userMessage(question));
  return {
    ...(model && { model }),
    messages,
    ...settings,
    stream: true,
    stream_options: { include_usage: true },
  };
}

function userMessage({ text, media }) {
  if (!media.length) return { role: "user", content: text };
  const parts = media.map((attachment) => {
    const type = `${attachment.kind}_url`;
    return { type, [type]: { url: attachment.data } };
  });
  if (text) parts.push({ type: "text", text });
  return { role: "user", content: parts };
}

/** The bytes of media would fill pages, so code reads them from the files they came from. */
export function filesOf(body, media) {
  const names = new Map(media.map((attachment) => [attachment.data, attachment.name]));
  const used = new Set();
  walk(body, (text) => names.has(text) && used.add(names.get(text)));
  return [...used];
}

export function asCurl(body, media, address, hasKey) {
  const names = new Map(media.map((attachment) => [attachment.data, attachment.name]));
  const files = []; // put in behind the escaping of the text around them
  const marked = walk({ ...body }, (text) => {
    if (!names.has(text)) return undefined;
    files.push([text.slice(0, text.indexOf(",") + 1), names.get(text)]);
    return `\u0000${files.length - 1}\u0000`;
  });
  const json = JSON.stringify(marked, null, 2).replace(/[\\$`]/g, "\\$&");
  const withFiles = json.replace(/\\\\u0000(\d+)\\\\u0000/g, (_, index) => {
    const [head, name] = files[index];
    return `${head}$(base64 -w0 ${shellQuoted(name)})`;
  });
  const key = hasKey ? ` \\\n  -H "Authorization: Bearer $OCTET_API_KEY"` : "";
  return `curl -N ${address}/v1/chat/completions \\\n  -H 'Content-Type: application/json'${key} \\\n`
    + `  -d @- <<JSON\n${withFiles}\nJSON\n`;
}

export function asPython(body, media, address, hasKey) {
  const names = new Map(media.map((attachment) => [attachment.data, attachment.name]));
  const { model, messages, stream, stream_options, enable_thinking, ...sampling } = body;
  const literal = (value) => pythonLiteral(value, names, 4);
  const key = hasKey ? 'os.environ["OCTET_API_KEY"]' : '"none"';
  const hasMedia = filesOf(body, media).length > 0;
  const imports = [hasMedia && "base64", "openai", hasKey && "os"].filter(Boolean);
  const lines = [`import ${imports.join(", ")}`, ""];
  if (hasMedia) {
    lines.push("", "def data_url(path, mime):",
      '    return f"data:{mime};base64," + base64.b64encode(open(path, "rb").read()).decode()', "", "");
  }
  lines.push(`client = openai.OpenAI(base_url="${address}/v1", api_key=${key})`);
  lines.push("stream = client.chat.completions.create(");
  lines.push(`    model=${literal(model ?? "octet")},`, `    messages=${literal(messages)},`);
  for (const [name, value] of Object.entries(sampling)) lines.push(`    ${name}=${literal(value)},`);
  lines.push(`    stream=${literal(stream)},`, `    stream_options=${literal(stream_options)},`);
  if (enable_thinking !== undefined) lines.push(`    extra_body=${literal({ enable_thinking })},`);
  lines.push(")", "for chunk in stream:", "    for choice in chunk.choices:",
    '        print(getattr(choice.delta, "reasoning_content", None) or choice.delta.content or "", end="", flush=True)',
    "print()", "");
  return lines.join("\n");
}

/** A copy of a JSON value with each string replaced by what `change` returns, unless that is undefined. */
function walk(value, change) {
  if (typeof value === "string") return change(value) ?? value;
  if (Array.isArray(value)) return value.map((item) => walk(item, change));
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([name, item]) => [name, walk(item, change)]));
}

function pythonLiteral(value, names, indent) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value === "string" && names.has(value)) {
    const mime = value.slice("data:".length, value.indexOf(";"));
    return `data_url(${pythonString(names.get(value))}, ${pythonString(mime)})`;
  }
  if (typeof value === "string") return pythonString(value);
  if (typeof value !== "object") return String(value);
  const pad = " ".repeat(indent + 4), end = " ".repeat(indent);
  const inner = (item) => pythonLiteral(item, names, indent + 4);
  const items = Array.isArray(value)
    ? value.map(inner)
    : Object.entries(value).map(([name, item]) => `${pythonString(name)}: ${inner(item)}`);
  const [open, close] = Array.isArray(value) ? "[]" : "{}";
  const short = `${open}${items.join(", ")}${close}`;
  if (short.length < 70 && !short.includes("\n")) return short;
  return `${open}\n${items.map((item) => `${pad}${item},\n`).join("")}${end}${close}`;
}

/** Every JSON string is a Python string, too. */
function pythonString(text) {
  return JSON.stringify(text);
}

function shellQuoted(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}
