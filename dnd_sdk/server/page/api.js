/** The server: requests with the key of this tab, refusals as errors that say what the server said. */

import { events } from "./sse.js";

const KEY = "dnd-api-key";
let key = stored(); // kept here too: a browser may refuse the storage
let locked = () => {};

/** A refusal, or no answer at all (status 0). */
export class ApiError extends Error {
  constructor(message, { status = 0, fix = null, retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { name: "ApiError", status, fix, retryAfter });
  }
}

/** Call this with the server's words whenever it wants a key, and with whether it has refused one. */
export function whenLocked(callback) {
  locked = callback;
}

/** Use a key from now on, in this tab and until it is closed; null: none. */
export function useKey(value) {
  key = value;
  try {
    if (value === null) sessionStorage.removeItem(KEY);
    else sessionStorage.setItem(KEY, value);
  } catch {
    // then it lasts until the page is reloaded
  }
}

/** The response to a request; `json` or `form` is its body. Throws ApiError, or AbortError after `signal`. */
export async function request(path, { method = "GET", json, form, accept = "application/json", signal } = {}) {
  const headers = new Headers({ Accept: accept });
  const used = key;
  if (key) headers.set("Authorization", `Bearer ${key}`);
  if (json !== undefined) headers.set("Content-Type", "application/json");
  const body = json === undefined ? form : JSON.stringify(json);
  let response;
  try {
    response = await fetch(new URL(path, document.baseURI), { method, headers, body, signal, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server does not answer.");
  }
  if (response.ok) return response;
  const refusal = await refused(response);
  // an answer to the key before says nothing of the one that has been given since
  if (refusal.status === 401 && used === key) {
    useKey(null);
    locked(refusal.message, used !== null);
  }
  throw refusal;
}

/** The JSON a request is answered with. */
export async function getJson(path, options) {
  return (await request(path, options)).json();
}

/** Yields the server-sent events of a request, their data as JSON where it is JSON. */
export async function* getEvents(path, options) {
  const response = await request(path, { ...options, accept: "text/event-stream" });
  try {
    for await (const { event, data } of events(response.body)) yield { event, data: parsed(data) };
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ApiError) throw error;
    throw new ApiError("The connection broke off.");
  }
}

/** The error that an `error` object of the server stands for. */
export function asError(error, status = 0, retryAfter = null) {
  const words = error?.message || (status ? `The server answered ${status}.` : "The server gave up, without a word.");
  return new ApiError(words, { status, fix: error?.fix, retryAfter });
}

async function refused(response) {
  const body = await response.json().catch(() => null);
  return asError(body?.error, response.status, response.headers.get("Retry-After"));
}

function parsed(data) {
  try {
    return JSON.parse(data);
  } catch {
    return data;
  }
}

function stored() {
  try {
    return sessionStorage.getItem(KEY);
  } catch {
    return null;
  }
}
