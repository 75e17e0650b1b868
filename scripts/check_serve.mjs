// Asks `finetune serve` with OpenAI's client for Node: models, a chat, streams and a refusal.
//
//     npm install --prefix FOLDER openai
//     node scripts/check_serve.mjs FINETUNE MODEL_DIR FOLDER
//
// Prints `node client  ok`, or what did not hold, and exits with 1 then. More is checked by check_serve.py.

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { createRequire } from "node:module";
import { resolve } from "node:path";

const [binary, model, folder] = process.argv.slice(2);
if (!folder) {
  console.error("write: node scripts/check_serve.mjs FINETUNE MODEL_DIR FOLDER");
  process.exit(2);
}
const { OpenAI } = createRequire(resolve(folder, "package.json"))("openai");

/** The address that the server prints once it listens. */
function address(server) {
  return new Promise((found, failed) => {
    let said = "";
    const timer = setTimeout(() => failed(new Error(`no address within 30 s: ${said}`)), 30_000);
    server.stdout.on("data", (part) => {
      said += part;
      const match = said.match(/http:\/\/127\.0\.0\.1:\d+/);
      if (match) {
        clearTimeout(timer);
        found(match[0]);
      }
    });
    server.on("exit", (code) => failed(new Error(`the server ended with ${code}: ${said}`)));
    server.on("error", failed);
  });
}

async function check(url) {
  const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
  const { data } = await client.models.list();
  const settings = { model: data[0].id, max_tokens: 12, temperature: 0 };
  const messages = [{ role: "user", content: "Hello, Mira from Oslo here. The blue lamp arrived broken." }];

  const chat = await client.chat.completions.create({ ...settings, messages });
  assert.equal(chat.usage.total_tokens, chat.usage.prompt_tokens + chat.usage.completion_tokens);
  let text = "", usage;
  const stream = await client.chat.completions.create({
    ...settings, messages, stream: true, stream_options: { include_usage: true },
  });
  for await (const chunk of stream) {
    text += chunk.choices[0]?.delta.content ?? "";
    usage = chunk.usage ?? usage;
  }
  assert.equal(text, chat.choices[0].message.content, "the stream of a chat");
  assert.equal(usage.completion_tokens, chat.usage.completion_tokens, "its usage");

  const whole = await client.completions.create({ ...settings, prompt: "Once" });
  text = "";
  for await (const chunk of await client.completions.create({ ...settings, prompt: "Once", stream: true })) {
    text += chunk.choices[0]?.text ?? "";
  }
  assert.equal(text, whole.choices[0].text, "the stream of a text");
  await assert.rejects(
    client.chat.completions.create({ ...settings, messages, temperature: -1 }),
    (error) => error instanceof OpenAI.BadRequestError && error.param === "temperature",
  );
}

const server = spawn(binary, ["serve", model, "--port", "0", "--device", "cpu"], { stdio: ["ignore", "pipe", "inherit"] });
try {
  await check(await address(server));
  console.log("node client  ok");
} catch (error) {
  console.error(`node client  WRONG: ${error.message}`);
  process.exitCode = 1;
} finally {
  server.kill("SIGKILL");
}
