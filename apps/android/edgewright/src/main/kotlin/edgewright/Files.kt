package edgewright

import java.io.File
import java.io.InputStream
import java.security.MessageDigest

internal const val CHUNK = 1 shl 16

internal fun MessageDigest.hex(): String = digest().joinToString("") { "%02x".format(it) }

internal fun sha256(): MessageDigest = MessageDigest.getInstance("SHA-256")

/** Reads a stream to its end, in parts of which `each` gets the buffer and its filled bytes. */
internal inline fun readAll(from: InputStream, each: (ByteArray, Int) -> Unit) {
    val buffer = ByteArray(CHUNK)
    while (true) {
        val count = from.read(buffer)
        if (count < 0) return
        each(buffer, count)
    }
}

internal fun sha256Of(file: File): String {
    val digest = sha256()
    file.inputStream().use { readAll(it) { data, count -> digest.update(data, 0, count) } }
    return digest.hex()
}

/** Throws EdgewrightException unless every file has the size that `app.json` says, and its SHA-256 where `hashes`. */
internal fun checkFiles(folder: File, files: Map<String, FileFact>, hashes: Boolean) {
    for ((name, fact) in files) {
        val file = File(folder, name)
        if (!file.isFile) fail("$file is missing; copy the whole folder that app.json lies in")
        if (file.length() != fact.bytes) {
            throw DamagedFileException(file, "$file has ${file.length()} bytes of ${fact.bytes}; download it again")
        }
        if (hashes && sha256Of(file) != fact.sha256) {
            throw DamagedFileException(file, "$file is damaged (its SHA-256 is not that of app.json); download it again")
        }
    }
}
