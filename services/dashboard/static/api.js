// The server's answers, and what a run does while the page is open.

export async function get(path, signal) {
  const answer = await fetch(`api/${path}`, { signal, headers: { accept: "application/json" } });
  if (answer.status === 401) location.assign("login");
  const data = await answer.json().catch(() => ({ error: `the server answered ${answer.status}` }));
  if (!answer.ok) throw Object.assign(new Error(data.error ?? `the server answered ${answer.status}`), { status: answer.status });
  return data;
}

export const runPath = (name) => `runs/${encodeURIComponent(name)}`;

export const pictureUrl = (name, kind, step, picture) =>
  `api/${runPath(name)}/pictures/${kind}/${step}/${picture[0]}-${picture[1]}`;

/** Follows a run until `signal` is aborted. A hidden page lets go of its connection and catches up afterwards. */
export function follow(name, since, handlers, signal) {
  let source = null;
  let last = since;
  const say = handlers.connection ?? (() => {});
  const open = () => {
    source = new EventSource(`api/${runPath(name)}/events?since=${last}`);
    source.onopen = () => say("connected");
    source.onerror = () => {
      say("reconnecting");
      if (source.readyState === EventSource.CLOSED) { close(); setTimeout(() => !signal.aborted && !document.hidden && !source && open(), 2000); }
    };
    source.addEventListener("rows", (event) => {
      const data = JSON.parse(event.data);
      last = data.rows[data.rows.length - 1].step;
      handlers.rows(data.rows);
    });
    source.addEventListener("groups", (event) => handlers.groups(JSON.parse(event.data).newest));
    source.addEventListener("state", () => handlers.changed());
    source.addEventListener("reload", () => { close(); handlers.reload(); });
  };
  const close = () => { source?.close(); source = null; };
  const visibility = () => {
    if (document.hidden) close();
    else if (!source) { open(); handlers.changed(); }
  };
  document.addEventListener("visibilitychange", visibility, { signal });
  signal.addEventListener("abort", () => { close(); say(""); });
  if (!document.hidden) open();
}
