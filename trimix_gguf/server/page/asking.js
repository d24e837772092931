// -- asking ---------------------------------------------------------------------------------------

const noAnswer = () => ({ text: "", pieces: [], mix: null, usage: null, end: null });

function messagesFor(turn, leftOut = turn.leftOut) {
  const before = turns.slice(leftOut, turns.indexOf(turn)).filter((t) => t.answer.text);
  const said = before.flatMap((t) => [
    { role: "user", content: t.question },
    { role: "assistant", content: t.answer.text },
  ]);
  const system = settings.system.trim() ? [{ role: "system", content: settings.system }] : [];
  return [...system, ...said, { role: "user", content: turn.question }];
}

function chosenMix() {
  const { alpha, beta, alone } = settings;
  const asServed = serverWeights?.[0] === alpha && serverWeights?.[1] === beta;
  // The server's own way of mixing is the default, so it is not sent.
  return {
    auto: serverWeights ? { method: "auto" } : {},
    fixed: asServed ? {} : { weights: [alpha, beta] },
    alone: { method: alone },
  }[settings.mix];
}

/** The two columns differ only in the mix: both models read the same messages. */
function bodyFor(part) {
  const mix = part.main ? { method: "large_ins" } : chosenMix();
  const body = { messages: messagesFor(part.main ?? part), stream: true, stream_options: { include_usage: true } };
  if (trios.length) body.model = $("trio").value;
  if (settings.temperature !== "") body.temperature = settings.temperature;
  if (settings.maxTokens !== "") body.max_tokens = settings.maxTokens;
  return { ...body, trimix: { trace: true, ...mix } };
}

function wantsBeside() {
  return $("beside").checked && !(settings.mix === "alone" && settings.alone === "large_ins");
}

/** Fill a turn's answers from the server, in place of older ones. Never rejects. */
async function ask(turn) {
  const abort = new AbortController();
  running = { turn, part: turn, abort };
  parts(turn).forEach(unpaint);
  turn.answer = noAnswer();
  turn.beside = wantsBeside() ? { question: turn.question, answer: noAnswer(), main: turn } : null;
  turn.leftOut = leftOutFor(turn);
  chat.time = Date.now();
  forgetUndo();
  show(turn);
  setBusy(true);
  follow = true;
  keepChat();
  for (const part of parts(turn)) {
    running.part = part;
    update(part);
    if (part.main && (turn.answer.end.failure || abort.signal.aborted)) part.answer.end = { name: "stopped" };
    else await answer(part, abort.signal);
    if (running?.abort !== abort) return; // forgotten meanwhile, by another chat
    update(part);
  }
  running = null;
  setBusy(false);
  keepChat();
  const { failure, name } = parts(turn).at(-1).answer.end;
  notice(failure);
  if (!failure) tell(say(name === "stopped" ? name : "ready"));
  if (failure === "needsKey") askKey(() => retry(turn));
}

/** One answer, whole: with fewer of the oldest turns where the server finds them too many. */
async function answer(part, signal) {
  const turn = part.main ?? part;
  try {
    for (;;) {
      try {
        await stream(part, signal);
        break;
      } catch (error) {
        if (error.failure !== "context" || part.answer.text || !leaveOutMore(turn)) throw error;
        update(turn);
      }
    }
    part.answer.end ??= { name: "stop" };
  } catch (error) {
    if (!signal.aborted) part.answer.end = { failure: error.failure ?? "failed", detail: error.detail ?? String(error) };
  }
  if (signal.aborted) part.answer.end = { name: "stopped" };
}

async function stream(part, signal) {
  const body = JSON.stringify(bodyFor(part));
  const headers = { "Content-Type": "application/json" };
  const response = await request("v1/chat/completions", { method: "POST", headers, body, signal });
  for await (const chunk of events(response.body)) {
    if (signal.aborted) break;
    take(part, chunk);
  }
}

function take(part, chunk) {
  const { answer } = part;
  if (chunk.error) throw failure(0, chunk.error);
  answer.mix = chunk.trimix?.weights ? chunk.trimix : answer.mix;
  if (answer.mix && chunk.trimix?.guard != null) answer.mix.guard = chunk.trimix.guard;
  if (chunk.usage) answer.usage = { prompt: chunk.usage.prompt_tokens, answer: chunk.usage.completion_tokens };
  for (const choice of chunk.choices) {
    answer.text += choice.delta.content ?? "";
    if (choice.finish_reason) answer.end = { name: choice.finish_reason };
  }
  for (const token of chunk.trimix?.tokens ?? []) addToken(answer, token);
  if (chunk.trimix?.finish_reason) answer.end = { name: chunk.trimix.finish_reason };
  update(part);
}

async function retry(turn) {
  if (running || (await isAway()) || running || !turns.includes(turn)) return;
  $("question").focus();
  ask(turn);
}

// -- what the context holds -------------------------------------------------------------------------

const bytes = (messages) => messages.reduce((sum, { content }) => sum + new TextEncoder().encode(content).length, 0);

/** How many of the oldest turns are not read for a question, as in `trimix chat`: where it leaves
 * no room to answer, so many that half of the context is free. By the size of what was counted last. */
function leftOutFor(turn) {
  const index = turns.indexOf(turn);
  const first = Math.min(turns[index - 1]?.leftOut ?? 0, index);
  const last = turns.slice(first, index).findLast(({ answer }) => answer.usage);
  const nContext = (models.find(({ id }) => id === last?.answer.mix?.trio) ?? models[0])?.max_model_len;
  if (!last || !nContext) return first;
  const perByte = last.answer.usage.prompt / bytes(messagesFor(last));
  const expected = (n) => perByte * bytes(messagesFor(turn, n));
  // An eighth more: the count is of one model, and another may read more tokens.
  const room = Math.min(settings.maxTokens || nContext, nContext / 4) + nContext / 8;
  if (expected(first) <= nContext - room) return first;
  let n = first;
  while (n < index && expected(n) > nContext / 2) n++;
  return n;
}

/** Leave out turns until half of what is read is gone; false where only the question is left. */
function leaveOutMore(turn) {
  const index = turns.indexOf(turn);
  if (turn.leftOut >= index) return false;
  const most = bytes(messagesFor(turn)) / 2;
  do turn.leftOut++;
  while (turn.leftOut < index && bytes(messagesFor(turn)) > most);
  return true;
}
