/** The sampling controls: what each may be. An empty one is left to the server. */
export const CONTROLS = [
  { name: "temperature", min: 0, max: 2, step: 0.05 },
  { name: "top_p", min: 0.01, max: 1, step: 0.01 },
  { name: "top_k", min: 0, max: 100_000, whole: true },
  { name: "max_tokens", min: 1, max: 1_000_000, whole: true },
  { name: "repetition_penalty", min: 0.1, max: 3, step: 0.05 },
  { name: "presence_penalty", min: -2, max: 2, step: 0.1 },
  { name: "frequency_penalty", min: -2, max: 2, step: 0.1 },
  { name: "seed", min: 0, max: Number.MAX_SAFE_INTEGER, whole: true },
];

export function isValid({ min, max, whole }, value) {
  return (
    Number.isFinite(value) && value >= min && value <= max && (!whole || Number.isInteger(value))
  );
}
