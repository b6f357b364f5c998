// A sweep: which directions one question is asked in. Along each objective's arc from end to end, or every preset.

const MOST = 5;

// [{ name, directions: [{ label, weights }] }], the arc the page looks along first.
export function sweeps(space) {
  const places = space.names.map((_, k) => k).filter((k) => space.poles[k] && (space.names.length > 2 || k === space.arc));
  places.sort((a, b) => (b === space.arc) - (a === space.arc));
  const arcs = places.map((k) => ({
    name: space.names[k],
    directions: space.across(k).map((weights) => ({ label: space.words(weights), weights })),
  }));
  const presets = Object.entries(space.data.presets ?? {}).slice(0, MOST);
  const named = presets.map(([label, preset]) => ({ label, weights: space.weightsOf(preset.weights) }));
  return named.length < 2 ? arcs : [...arcs, { name: "the presets", directions: named }];
}
