import Foundation

/// JSON whose texts are told apart scalar by scalar: Foundation's dictionaries hold "é" and "e" with an accent to be one key.
enum JSON {
  case null
  case bool(Bool)
  case number(Double)
  case text(Chars)
  case list([JSON])
  case object([(key: Chars, value: JSON)])

  static func read(_ file: URL) throws -> JSON {
    let data = try Files.read(file)
    return try data.withUnsafeBytes { bytes in
      var reader = Reader(bytes: bytes)
      guard let value = reader.value(depth: 0), reader.atEnd() else {
        throw EdgewrightError("\(file.path) is no JSON; copy the file again")
      }
      return value
    }
  }

  /// The value of a key; nil where there is none, or null.
  subscript(_ key: String) -> JSON? {
    guard case .object(let entries) = self else { return nil }
    let wanted = Edgewright.chars(key)
    guard let found = entries.last(where: { $0.key == wanted })?.value else { return nil }
    if case .null = found { return nil }
    return found
  }

  var chars: Chars? {
    if case .text(let text) = self { text } else { nil }
  }
  var text: String? { chars.map { string($0) } }
  var flag: Bool? {
    if case .bool(let flag) = self { flag } else { nil }
  }
  var double: Double? {
    if case .number(let number) = self { number } else { nil }
  }
  var int: Int? { double.flatMap { Int(exactly: $0) } }
  var list: [JSON]? {
    if case .list(let list) = self { list } else { nil }
  }
  var entries: [(key: Chars, value: JSON)]? {
    if case .object(let entries) = self { entries } else { nil }
  }

  private struct Reader {
    private static let deepest = 200
    let bytes: UnsafeRawBufferPointer
    var at = 0

    init(bytes: UnsafeRawBufferPointer) {
      self.bytes = bytes
    }

    mutating func atEnd() -> Bool {
      skip()
      return at == bytes.count
    }

    mutating func value(depth: Int) -> JSON? {
      skip()
      guard at < bytes.count, depth < Reader.deepest else { return nil }
      switch bytes[at] {
      case UInt8(ascii: "{"): return object(depth)
      case UInt8(ascii: "["): return list(depth)
      case UInt8(ascii: "\""): return text().map { .text($0) }
      case UInt8(ascii: "t"): return take("true") ? .bool(true) : nil
      case UInt8(ascii: "f"): return take("false") ? .bool(false) : nil
      case UInt8(ascii: "n"): return take("null") ? .null : nil
      default: return number()
      }
    }

    private mutating func skip() {
      while at < bytes.count, bytes[at] == 0x20 || bytes[at] == 0x0A || bytes[at] == 0x0D || bytes[at] == 0x09 { at += 1 }
    }

    private mutating func take(_ word: StaticString) -> Bool {
      let count = word.utf8CodeUnitCount
      guard at + count <= bytes.count, memcmp(bytes.baseAddress! + at, word.utf8Start, count) == 0 else { return false }
      at += count
      return true
    }

    private mutating func object(_ depth: Int) -> JSON? {
      at += 1
      var entries: [(key: Chars, value: JSON)] = []
      skip()
      if take("}") { return .object(entries) }
      while true {
        skip()
        guard at < bytes.count, bytes[at] == UInt8(ascii: "\""), let key = text() else { return nil }
        skip()
        guard take(":"), let value = value(depth: depth + 1) else { return nil }
        entries.append((key, value))
        skip()
        if take("}") { return .object(entries) }
        guard take(",") else { return nil }
      }
    }

    private mutating func list(_ depth: Int) -> JSON? {
      at += 1
      var values: [JSON] = []
      skip()
      if take("]") { return .list(values) }
      while true {
        guard let value = value(depth: depth + 1) else { return nil }
        values.append(value)
        skip()
        if take("]") { return .list(values) }
        guard take(",") else { return nil }
      }
    }

    private mutating func number() -> JSON? {
      let from = at
      while at < bytes.count, "+-.eE0123456789".utf8.contains(bytes[at]) { at += 1 }
      return Double(String(decoding: bytes[from..<at], as: UTF8.self)).map { .number($0) }
    }

    private mutating func text() -> Chars? {
      at += 1
      var (out, from) = (Chars(), at)
      while at < bytes.count {
        let byte = bytes[at]
        if byte == UInt8(ascii: "\"") {
          out += Edgewright.chars(utf8: bytes[from..<at]).text
          at += 1
          return out
        }
        guard byte == UInt8(ascii: "\\") else {
          at += 1
          continue
        }
        out += Edgewright.chars(utf8: bytes[from..<at]).text
        at += 1
        guard let c = escaped() else { return nil }
        out.append(c)
        from = at
      }
      return nil
    }

    private mutating func escaped() -> UInt32? {
      guard at < bytes.count else { return nil }
      at += 1
      switch bytes[at - 1] {
      case UInt8(ascii: "n"): return 0x0A
      case UInt8(ascii: "t"): return 0x09
      case UInt8(ascii: "r"): return 0x0D
      case UInt8(ascii: "b"): return 0x08
      case UInt8(ascii: "f"): return 0x0C
      case UInt8(ascii: "u"):
        guard let high = hexadecimal() else { return nil }
        guard (0xD800..<0xDC00).contains(high) else { return (0xDC00..<0xE000).contains(high) ? replacement : high }
        let before = at
        guard take("\\u"), let low = hexadecimal(), (0xDC00..<0xE000).contains(low) else {
          at = before
          return replacement
        }
        return 0x10000 + (high - 0xD800) << 10 + (low - 0xDC00)
      case let plain: return "\"\\/".utf8.contains(plain) ? UInt32(plain) : nil
      }
    }

    private mutating func hexadecimal() -> UInt32? {
      guard at + 4 <= bytes.count else { return nil }
      at += 4
      return UInt32(String(decoding: bytes[at - 4..<at], as: UTF8.self), radix: 16)
    }
  }
}
