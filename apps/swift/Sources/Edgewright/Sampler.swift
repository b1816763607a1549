import Foundation

/// Draws tokens. Penalties, then temperature, top-k, top-p, min-p: in this order, as transformers does.
struct Sampler {
  private let how: Sampling
  private var random: SplitMix

  init(_ how: Sampling) throws {
    let sound =
      how.temperature >= 0 && how.topP > 0 && how.topP <= 1 && how.minP >= 0 && how.minP <= 1 && how.repetitionPenalty > 0
      && how.topK >= 0 && how.noRepeatNgram >= 0
    guard sound else {
      throw EdgewrightError(
        "the sampling means nothing: temperature from 0, topP above 0 up to 1, minP from 0 to 1, repetitionPenalty above 0")
    }
    self.how = how
    random = SplitMix(state: how.seed)
  }

  /// seen: all tokens that the decoder has read or written.
  mutating func pick(_ given: UnsafeBufferPointer<Float>, seen: [Token]) -> Token {
    if how.temperature == 0, how.repetitionPenalty == 1, how.noRepeatNgram == 0 { return best(given) }
    var logits = given.map(Double.init)
    for token in how.repetitionPenalty == 1 ? [] : Set(seen) {
      logits[token] = logits[token] < 0 ? logits[token] * how.repetitionPenalty : logits[token] / how.repetitionPenalty
    }
    let n = how.noRepeatNgram
    if n > 0, seen.count >= n {
      let ending = seen.suffix(n - 1)
      for i in 0...seen.count - n where seen[i..<i + n - 1].elementsEqual(ending) {
        logits[seen[i + n - 1]] = -.infinity
      }
    }
    return how.temperature == 0 ? logits.withUnsafeBufferPointer { best($0) } : draw(&logits)
  }

  private mutating func draw(_ logits: inout [Double]) -> Token {
    for i in logits.indices { logits[i] /= how.temperature }
    let order = logits.indices.sorted { (logits[$1], $0) < (logits[$0], $1) }
    if how.topK > 0, how.topK < order.count {
      let least = logits[order[how.topK - 1]]
      for i in logits.indices where logits[i] < least { logits[i] = -.infinity }
    }
    if how.topP < 1 {
      let chances = softmax(logits)
      var before = 0.0
      for i in order {
        if before >= how.topP { logits[i] = -.infinity }
        before += chances[i]
      }
    }
    var chances = softmax(logits)
    let floor = how.minP * (chances.max() ?? 0)
    for i in chances.indices where chances[i] < floor { chances[i] = 0 }
    var left = random.unit() * chances.reduce(0, +)
    for i in order where chances[i] > 0 {
      left -= chances[i]
      if left < 0 { return i }
    }
    return order[0]
  }
}

/// Where the largest is, the first of equals.
func best<Number: Comparable>(_ values: UnsafeBufferPointer<Number>) -> Int {
  var found = 0
  for i in values.indices where values[i] > values[found] { found = i }
  return found
}

private func softmax(_ logits: [Double]) -> [Double] {
  let most = logits.max() ?? 0
  let chances = logits.map { exp($0 - most) }
  let sum = chances.reduce(0, +)
  return chances.map { $0 / sum }
}

/// SplitMix64: the same seed gives the same numbers everywhere.
private struct SplitMix {
  var state: UInt64

  mutating func unit() -> Double {
    state &+= 0x9E37_79B9_7F4A_7C15
    var z = state
    z = (z ^ (z >> 30)) &* 0xBF58_476D_1CE4_E5B9
    z = (z ^ (z >> 27)) &* 0x94D0_49BB_1331_11EB
    return Double((z ^ (z >> 31)) >> 11) / Double(1 << 53)
  }
}
