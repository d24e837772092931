function messagesFor(turn) {
  const before = turns.slice(0, turns.indexOf(turn)).filter((t) => t.answer.text);
  const said = before.flatMap((t) => [
    { role: "user", content: t.question },
    { role: "assistant", content: t.answer.text },
  ]);
  const system = settings.system.trim() ? [{ role: "system", content: settings.system }] : [];
  return [...system, ...said, { role: "user", content: turn.question }];
}

function bodyFor(turn) {
  const { alpha, beta, alone } = settings;
  const asServed = serverWeights?.[0] === alpha && serverWeights?.[1] === beta;
  // The server's own way of mixing is the default, so it is not sent.
  const mix = {
    auto: serverWeights ? { method: "auto" } : {},
    fixed: asServed ? {} : { weights: [alpha, beta] },
    alone: { method: alone },
  };
  const body = { messages: messagesFor(turn), stream: true };
  if (trios.length) body.model = $("trio").value;
  if (settings.temperature !== "") body.temperature = settings.temperature;
  if (settings.maxTokens !== "") body.max_tokens = settings.maxTokens;
  return { ...body, trimix: { trace: true, ...mix[settings.mix] } };
}

/** Fill a turn's answer from the server, in place of an older one. Never rejects. */
async function ask(turn) {
  const abort = new AbortController();
  const { signal } = abort;
  running = { turn, abort };
  turn.answer = { text: "", pieces: [], mix: null, end: null };
  show(turn);
  setBusy(true);
  follow = true;
  keepTurns();
  try {
    const body = JSON.stringify(bodyFor(turn));
    const headers = { "Content-Type": "application/json" };
    const response = await request("v1/chat/completions", { method: "POST", headers, body, signal });
    for await (const chunk of events(response.body)) {
      if (signal.aborted) break;
      take(turn, chunk);
    }
  } catch (error) {
    if (!signal.aborted) turn.answer.end = { failure: error.failure ?? "failed", detail: error.detail ?? String(error) };
  }
  if (running?.abort !== abort) return; // forgotten meanwhile, by a new conversation
  if (signal.aborted) turn.answer.end = { name: "stopped" };
  running = null;
  setBusy(false);
  update(turn);
  keepTurns();
  const { failure, name } = turn.answer.end;
  $("status").textContent = failure ? "" : say(name === "stopped" ? name : "ready");
  if (failure === "needsKey") askKey(() => retry(turn));
}

function take(turn, chunk) {
  const { answer } = turn;
  if (chunk.error) throw failure(0, chunk.error);
  answer.mix = chunk.trimix?.weights ? chunk.trimix : answer.mix;
  if (answer.mix && chunk.trimix?.guard != null) answer.mix.guard = chunk.trimix.guard;
  for (const choice of chunk.choices) {
    answer.text += choice.delta.content ?? "";
    if (choice.finish_reason) answer.end = { name: choice.finish_reason };
  }
  for (const token of chunk.trimix?.tokens ?? []) addToken(answer, token);
  if (chunk.trimix?.finish_reason) answer.end = { name: chunk.trimix.finish_reason };
  update(turn);
}

function retry(turn) {
  if (running) return;
  $("question").focus();
  ask(turn);
}
