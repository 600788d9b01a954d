// Requests to the page's own server.

async function answerTo(path, body, signal) {
  const options = body && {method: "POST", body: JSON.stringify(body), signal,
    headers: {"Content-Type": "application/json"}};
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("the server does not answer; is it still running?");
  }
  if (!answer.ok) {
    const problem = await answer.json().catch(() => ({}));
    throw new Error(problem.error || `the server answered ${answer.status}`);
  }
  return answer;
}

export async function ask(path, body) {
  return (await answerTo(path, body)).json();
}

export async function file(path, body) {
  return (await answerTo(path, body)).blob();
}

// The JSON lines of an answer, as they come.
export async function* lines(path, body, signal) {
  const answer = await answerTo(path, body, signal);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const {value, done} = await reader.read();
    if (done) break;
    const whole = (rest + value).split("\n");
    rest = whole.pop();
    for (const line of whole) yield JSON.parse(line);
  }
}
