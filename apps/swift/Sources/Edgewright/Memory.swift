import Foundation

/// What a decoder-decoder made of a context; it serves any number of prompts of the same model.
public struct Memory: Sendable, Equatable {
  public let rows: Int
  /// [rows, hidden]
  public let values: [Float]
  /// Of the weights that made it.
  public let fingerprint: String

  private struct Head: Codable {
    let fingerprint: String
    let rows: Int
    let bytes: Int

    enum CodingKeys: String, CodingKey {
      case rows, bytes
      case fingerprint = "edgewright.memory"
    }
  }

  init(rows: Int, values: [Float], fingerprint: String) {
    (self.rows, self.values, self.fingerprint) = (rows, values, fingerprint)
  }

  /// Reads a memory that was saved.
  public init(contentsOf file: URL) throws {
    let data = try Files.read(file)
    let end = data.firstIndex(of: 0x0A) ?? data.endIndex
    let body = data.suffix(from: min(end + 1, data.endIndex))
    guard let head = try? JSONDecoder().decode(Head.self, from: data[..<end]), head.rows >= 0, head.bytes == body.count,
      head.bytes % MemoryLayout<Float>.size == 0
    else {
      throw EdgewrightError("\(file.path) is no memory of a context; read the context again and save it")
    }
    var values = [Float](repeating: 0, count: head.bytes / MemoryLayout<Float>.size)
    _ = values.withUnsafeMutableBytes { body.copyBytes(to: $0) }
    self.init(rows: head.rows, values: values, fingerprint: head.fingerprint)
  }

  /// Writes it whole or not at all.
  public func save(to file: URL) throws {
    let body = values.withUnsafeBytes { Data($0) }
    do {
      var data = try JSONEncoder().encode(Head(fingerprint: fingerprint, rows: rows, bytes: body.count))
      data.append(0x0A)
      try (data + body).write(to: file, options: .atomic)
    } catch {
      throw EdgewrightError("\(file.path) cannot be written; look at the disk")
    }
  }
}
